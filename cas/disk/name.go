package disk

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"strconv"
	"strings"

	"github.com/jetfarm/jetfarm/cas/digest"
)

// maxToken is the longest token that is put into a file name, which has 255 bytes at most.
const maxToken = 140

// spaceName is the part of a file name that says the key space: its token or, where that is too
// long for a file name, the function and the token's hash. A tilde is in no token.
func spaceName(s digest.Space) string {
	token := s.Token()
	if len(token) <= maxToken {
		return token
	}
	sum := sha256.Sum256([]byte(token))
	return s.Function().String() + "~" + hex.EncodeToString(sum[:])
}

// shards is how many directories the files are spread over, by the first byte of the hash.
const shards = 256

func shard(i byte) string { return hex.EncodeToString([]byte{i}) }

// fileName is `<2 hex>/<space>-<hash>-<size>[x][.<sum>].<generation>`, a path relative to cas. The sum
// is eight hex digits, and left out of files whose sum nobody has computed.
func fileName(space string, e entry) string {
	b := make([]byte, 0, 3+len(space)+1+2*len(e.key.hash)+44)
	b = hex.AppendEncode(b, e.key.hash[:1])
	b = append(b, '/')
	b = append(b, space...)
	b = append(b, '-')
	b = hex.AppendEncode(b, e.key.hash[:])
	b = append(b, '-')
	b = strconv.AppendInt(b, e.size, 10)
	if e.key.executable {
		b = append(b, 'x')
	}
	if e.summed {
		b = append(b, '.')
		b = hex.AppendEncode(b, binary.BigEndian.AppendUint32(nil, e.sum))
	}
	b = append(b, '.')
	b = strconv.AppendUint(b, e.generation, 10)
	return string(b)
}

// parseName is the inverse of fileName for a name without its directory; the key has no space yet.
func parseName(name string) (space string, e entry, ok bool) {
	rest, generation, ok := cutLast(name, '.')
	if !ok {
		return "", entry{}, false
	}
	rest, size, ok := cutLast(rest, '-')
	if !ok {
		return "", entry{}, false
	}
	size, sum, summed := strings.Cut(size, ".")
	size, e.key.executable = strings.CutSuffix(size, "x")
	space, hash, ok := cutLast(rest, '-')
	if !ok || len(hash) != 2*len(e.key.hash) || space == "" {
		return "", entry{}, false
	}
	var errs [4]error
	_, errs[0] = hex.Decode(e.key.hash[:], []byte(hash))
	e.size, errs[1] = strconv.ParseInt(size, 10, 64)
	e.generation, errs[2] = strconv.ParseUint(generation, 10, 64)
	if summed {
		var v uint64
		v, errs[3] = strconv.ParseUint(sum, 16, 32)
		e.sum, e.summed = uint32(v), true
	}
	if errs != [4]error{} || e.size <= 0 {
		return "", entry{}, false
	}
	return space, e, fileName(space, e)[3:] == name
}

func cutLast(s string, sep byte) (before, after string, ok bool) {
	i := strings.LastIndexByte(s, sep)
	if i < 0 {
		return "", "", false
	}
	return s[:i], s[i+1:], true
}
