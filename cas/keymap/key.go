package keymap

import (
	"crypto/sha256"

	"github.com/jetfarm/jetfarm/cas/digest"
)

// Key names a blob: the first half of its hash, and outside the default key space mixed with the hash
// of the space's token. Two blobs of one key would have to agree in 128 bits of their hashes.
type Key [16]byte

// Keyer makes keys. It remembers the last space, since the digests of one request mostly share it.
type Keyer struct {
	space digest.Space
	mix   Key
}

// Of returns the key of a digest.
func (k *Keyer) Of(d digest.Digest) Key {
	if space := d.Space(); space != k.space {
		k.space, k.mix = space, Key{}
		if space.Instance() != "" || space.Function() != digest.SHA256 {
			sum := sha256.Sum256([]byte(space.Token()))
			k.mix = Key(sum[:len(k.mix)])
		}
	}
	hash, out := d.Hash(), k.mix
	for i := range out {
		out[i] ^= Nibble(hash[2*i])<<4 | Nibble(hash[2*i+1])
	}
	return out
}

// Of is the key of a single digest.
func Of(d digest.Digest) Key {
	var k Keyer
	return k.Of(d)
}

// Nibble is the value of a lower-case hex digit, without a branch.
func Nibble(c byte) byte { return c&0xf + c>>6*9 }
