package digest

import (
	"encoding/base64"
	"fmt"
	"strings"
)

// Token is the space as one NATS subject token, which is also a legal KV key part and file name:
// the function, and for a named instance a dash and its unpadded base64url.
func (s Space) Token() string {
	if s.instance == "" {
		return s.function.String()
	}
	return s.function.String() + "-" + base64.RawURLEncoding.EncodeToString([]byte(s.instance))
}

// ParseToken is the inverse of Token and accepts nothing else. The error wraps ErrInvalid.
func ParseToken(token string) (Space, error) {
	function, encoded, named := strings.Cut(token, "-")
	f := functionNamed(function)
	if !f.supported() {
		return Space{}, fmt.Errorf("%w: %s is not the token of a key space", ErrInvalid, Quote(token))
	}
	instance, err := base64.RawURLEncoding.Strict().DecodeString(encoded)
	if err != nil || (named && len(instance) == 0) {
		return Space{}, fmt.Errorf("%w: %s is not the token of a key space", ErrInvalid, Quote(token))
	}
	s, err := SpaceOf(string(instance), f.Proto(), "")
	if err == nil && s.Token() != token { // The decoder skips line ends.
		return Space{}, fmt.Errorf("%w: %s is not the token of a key space", ErrInvalid, Quote(token))
	}
	return s, err
}
