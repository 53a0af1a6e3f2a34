package fetch_test

import (
	"testing"

	"github.com/jetfarm/jetfarm/frontend/fetch"
)

// What is accepted can be computed, and errors are short whatever they are about.
func FuzzParseChecksums(f *testing.F) {
	for _, text := range []string{"sha256-qznLcsROx4GACP2dm0UCKCzCG+HiZ1guq6ZZDob/Tng=", "sha1-xdwiqBRZTtvYn+TLcnbCm3TFa6Q=?x sha512-A", "", "- -"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		sums, err := fetch.ParseChecksums(text)
		if err != nil {
			if len(err.Error()) > 1000 {
				t.Errorf("an error of %d bytes", len(err.Error()))
			}
			return
		}
		check := sums.Check()
		if _, err := check.Write([]byte(text)); err != nil {
			t.Error(err)
		}
		_ = check.Verdict() //nolint:errcheck // either is right
	})
}
