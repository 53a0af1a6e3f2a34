package digest_test

import (
	"errors"
	"math"
	"strings"
	"testing"
	"unicode/utf8"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/jetfarm/jetfarm/cas/digest"
)

const (
	helloHash = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
	emptyHash = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
)

func space(t testing.TB, instance string) digest.Space {
	t.Helper()
	s, err := digest.SpaceOf(instance, repb.DigestFunction_SHA256, "")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// wantInvalid checks for rows GEN-29 and GEN-30: the error is ErrInvalid and its text is short and
// valid UTF-8, whatever the client sent.
func wantInvalid(t *testing.T, name string, err error) {
	t.Helper()
	if !errors.Is(err, digest.ErrInvalid) {
		t.Errorf("%s: error %v, want ErrInvalid", name, err)
		return
	}
	if text := err.Error(); !utf8.ValidString(text) || len(text) > 4<<10 {
		t.Errorf("%s: an error text of %d bytes, valid UTF-8 %t", name, len(text), utf8.ValidString(text))
	}
}

// TestSpaceOf is rows GEN-3, GEN-4, GEN-6 and GEN-12 to GEN-16.
func TestSpaceOf(t *testing.T) {
	for _, instance := range []string{
		"", "main", "a/b/c", "x", "blob", "Blobs", "blobsx", "my-uploads", "über/größe", "with space", "*", ">", "a.b", "...",
		"-", "_", "%2f", "日本", strings.Repeat("x", digest.MaxInstance), strings.Repeat("a/", digest.MaxInstance/2-1) + "ab",
	} {
		s, err := digest.SpaceOf(instance, repb.DigestFunction_SHA256, "")
		if err != nil {
			t.Errorf("%q: %v", instance, err)
		}
		if s.Instance() != instance || s.Function() != digest.SHA256 {
			t.Errorf("%q: instance %q, function %v", instance, s.Instance(), s.Function())
		}
	}
	for name, instance := range map[string]string{
		"slash": "/", "leading slash": "/a", "trailing slash": "a/", "doubled slash": "a//b",
		"blobs": "blobs", "inner blobs": "x/blobs/y", "last blobs": "x/blobs", "uploads": "uploads", "actions": "a/actions",
		"actionResults": "actionResults/x", "operations": "operations", "capabilities": "x/capabilities",
		"compressed-blobs": "x/compressed-blobs", "dot": "a/./b", "parent": "..", "inner parent": "a/../b",
		"zero": "a\x00b", "newline": "a\nb", "delete": "a\x7f", "not UTF-8": "a\xff\xfe", "too long": strings.Repeat("x", digest.MaxInstance+1),
		"ten megabytes": strings.Repeat("\xff", 10<<20),
	} {
		_, err := digest.SpaceOf(instance, repb.DigestFunction_SHA256, "")
		wantInvalid(t, name, err)
	}
	for name, test := range map[string]struct {
		function repb.DigestFunction_Value
		hash     string
		ok       bool
	}{
		"sha256": {repb.DigestFunction_SHA256, "", true}, "sha256 with any hash": {repb.DigestFunction_SHA256, "xyz", true},
		"inferred": {repb.DigestFunction_UNKNOWN, helloHash, true}, "nothing to infer from": {repb.DigestFunction_UNKNOWN, "", true},
		"sha1 by length": {repb.DigestFunction_UNKNOWN, helloHash[:40], false}, "md5 by length": {repb.DigestFunction_UNKNOWN, helloHash[:32], false},
		"sha512 by length": {repb.DigestFunction_UNKNOWN, helloHash + helloHash, false},
		"sha1":             {repb.DigestFunction_SHA1, "", false}, "blake3": {repb.DigestFunction_BLAKE3, helloHash, false},
		"unknown number": {77, helloHash, false}, "negative number": {-1, helloHash, false},
	} {
		s, err := digest.SpaceOf("main", test.function, test.hash)
		if !test.ok {
			wantInvalid(t, name, err)
		} else if err != nil || s != space(t, "main") {
			t.Errorf("%s: %v, error %v", name, s, err)
		}
	}
}

// TestParse is rows GEN-8, GEN-10 and GEN-11 and X-3.
func TestParse(t *testing.T) {
	s := space(t, "main")
	d, err := s.Parse(&repb.Digest{Hash: helloHash, SizeBytes: 5})
	if err != nil {
		t.Fatal(err)
	}
	if d.Hash() != helloHash || d.Size() != 5 || d.Space() != s || d.IsZero() || d.IsEmpty() || d.IsImpossible() {
		t.Errorf("%+v", d)
	}
	if d != s.Of([]byte("hello")) {
		t.Errorf("%v is not the digest of hello, %v", d, s.Of([]byte("hello")))
	}
	h := s.Function().New()
	h.Write([]byte("hello"))
	if sum := s.Sum(h, 5); sum != d {
		t.Errorf("Sum: %v, want %v", sum, d)
	}
	if d == space(t, "other").Of([]byte("hello")) {
		t.Error("digests of two spaces are equal")
	}
	if p := d.Proto(); p.GetHash() != helloHash || p.GetSizeBytes() != 5 {
		t.Errorf("Proto: %v", p)
	}
	if d.String() != "main/blobs/"+helloHash+"/5" || d.Blob() != "blobs/"+helloHash+"/5" {
		t.Errorf("names %q and %q", d.String(), d.Blob())
	}
	if _, err := s.Parse(&repb.Digest{Hash: helloHash, SizeBytes: math.MaxInt64}); err != nil {
		t.Errorf("the largest size: %v", err)
	}
	for name, m := range map[string]*repb.Digest{
		"nil": nil, "zero": {}, "no hash": {SizeBytes: 5}, "upper case": {Hash: strings.ToUpper(helloHash), SizeBytes: 5},
		"one upper": {Hash: "A" + helloHash[1:]}, "short": {Hash: helloHash[1:]}, "long": {Hash: helloHash + "0"},
		"not hex": {Hash: "g" + helloHash[1:]}, "space": {Hash: " " + helloHash[1:]}, "zero byte": {Hash: "\x00" + helloHash[1:]},
		"unicode digit": {Hash: "٣" + helloHash[2:]}, "path": {Hash: "../../../etc/passwd"}, "path of 64": {Hash: strings.Repeat("../", 21) + "x"},
		"negative": {Hash: helloHash, SizeBytes: -1}, "most negative": {Hash: helloHash, SizeBytes: math.MinInt64},
		"sha1": {Hash: helloHash[:40]}, "not UTF-8": {Hash: strings.Repeat("\xff", 64)}, "ten megabytes": {Hash: strings.Repeat("0", 10<<20)},
	} {
		_, err := s.Parse(m)
		wantInvalid(t, name, err)
	}
}

// TestEmptyAndImpossible is rows GEN-20 and GEN-21.
func TestEmptyAndImpossible(t *testing.T) {
	s := space(t, "")
	for _, test := range []struct {
		hash              string
		size              int64
		empty, impossible bool
	}{
		{emptyHash, 0, true, false},
		{emptyHash, 1, false, true},
		{helloHash, 0, false, true},
		{helloHash, 5, false, false},
	} {
		d, err := s.New(test.hash, test.size)
		if err != nil {
			t.Fatal(err)
		}
		if d.IsEmpty() != test.empty || d.IsImpossible() != test.impossible {
			t.Errorf("%v: empty %t, impossible %t", d, d.IsEmpty(), d.IsImpossible())
		}
	}
	if d := s.Of(nil); !d.IsEmpty() || d.Hash() != s.Function().Empty() {
		t.Errorf("no bytes have the digest %v", d)
	}
	if !(digest.Digest{}).IsZero() {
		t.Error("the zero Digest is something")
	}
}

func TestFunction(t *testing.T) {
	for _, f := range digest.Functions() {
		if f.HexLen() != 2*f.New().Size() || len(f.Empty()) != f.HexLen() || f.Proto() == repb.DigestFunction_UNKNOWN {
			t.Errorf("%v is not consistent", f)
		}
		if want := strings.ToLower(f.Proto().String()); f.String() != want {
			t.Errorf("name %q, want %q", f, want)
		}
	}
	if digest.Function(99).String() == digest.SHA256.String() {
		t.Error("an unknown function has the name of another")
	}
}

func TestToken(t *testing.T) {
	for instance, token := range map[string]string{
		"": "sha256", "main": "sha256-bWFpbg", "a/b": "sha256-YS9i", "*.>": "sha256-Ki4-", "über": "sha256-w7xiZXI", "?>": "sha256-Pz4",
	} {
		s := space(t, instance)
		if s.Token() != token {
			t.Errorf("%q: token %q, want %q", instance, s.Token(), token)
		}
		back, err := digest.ParseToken(token)
		if err != nil || back != s {
			t.Errorf("%q: parsed as %v, error %v", token, back, err)
		}
	}
	for _, token := range []string{
		"", "-", "sha1", "SHA256", "sha256-", "sha256-=", "sha256-bWFpbg==", "sha256-bWFpbh", "sha256-bWFp bg", "sha256-YS8vYg", "sha256-YmxvYnM",
		"sha256.bWFpbg", "sha256-bWFpbg\n", "sha256-bWFp\nbg", "sha256-bWFp\r\nbg", "blake3-bWFpbg", "sha256-" + strings.Repeat("YWFh", 100), "sha256-_w",
	} {
		s, err := digest.ParseToken(token)
		if err == nil {
			t.Errorf("%q: parsed as %q", token, s.Instance())
		}
		wantInvalid(t, token, err)
	}
}

func TestQuote(t *testing.T) {
	for _, v := range []string{"", "a", "a\x00b", "\xff", strings.Repeat("é", 300), strings.Repeat("\xff", 1<<20)} {
		if q := digest.Quote(v); !utf8.ValidString(q) || len(q) > 4*256+5 || q[0] != '"' {
			t.Errorf("%d bytes are quoted as %d: %.50s", len(v), len(q), q)
		}
	}
}
