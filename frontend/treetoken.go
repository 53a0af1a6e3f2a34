package frontend

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"fmt"

	"github.com/jetfarm/jetfarm/cas/digest"
)

// A tree token names the last directory that was sent: a version byte, a check over the root and the
// rest, the hash and the size as a varint, in unpadded base64url. It holds nothing of the frontend that
// made it, so any other resumes from it, after a restart too (row TREE-7). The check tells a token
// that was damaged or belongs to another root; it is no secret, since all that a forged token can do
// is to begin somewhere else in a tree that its bearer may read anyway.
const (
	treeTokenVersion = 1
	treeCheckBytes   = 12
)

func treeToken(root, last digest.Digest) string {
	body := treeTokenBody(last)
	check := treeCheck(root, body)
	token := append([]byte{treeTokenVersion}, check[:]...)
	return base64.RawURLEncoding.EncodeToString(append(token, body...))
}

func treeTokenBody(last digest.Digest) []byte {
	hash, err := hex.DecodeString(last.Hash())
	if err != nil {
		panic("a Digest has a hexadecimal hash: " + err.Error())
	}
	return binary.AppendVarint(hash, last.Size())
}

func treeCheck(root digest.Digest, body []byte) [treeCheckBytes]byte {
	h := sha256.New()
	fmt.Fprintf(h, "jetfarm tree token\n%v\n", root)
	h.Write(body)
	return [treeCheckBytes]byte(h.Sum(nil))
}

// parseTreeToken returns the directory after which a call for root goes on.
func parseTreeToken(token string, root digest.Digest) (digest.Digest, error) {
	invalid := fmt.Errorf("%w: page_token %s is not one of %v", errInvalid, digest.Quote(token), root)
	raw, err := base64.RawURLEncoding.Strict().DecodeString(token)
	hashBytes := root.Space().Function().HexLen() / 2
	const head = 1 + treeCheckBytes
	if err != nil || len(raw) <= head+hashBytes || raw[0] != treeTokenVersion {
		return digest.Digest{}, invalid
	}
	body := raw[head:]
	check := treeCheck(root, body)
	if subtle.ConstantTimeCompare(raw[1:head], check[:]) != 1 {
		return digest.Digest{}, invalid
	}
	size, n := binary.Varint(body[hashBytes:])
	if n <= 0 || hashBytes+n != len(body) {
		return digest.Digest{}, invalid
	}
	last, err := root.Space().New(hex.EncodeToString(body[:hashBytes]), size)
	if err != nil {
		return digest.Digest{}, invalid
	}
	return last, nil
}
