package digest_test

import (
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"os"
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
	const unknown = repb.DigestFunction_UNKNOWN
	for name, test := range map[string]struct {
		function repb.DigestFunction_Value
		hash     string
		want     digest.Function // 0 for an error
	}{
		"sha256": {digest.SHA256.Proto(), "", digest.SHA256}, "sha256 with any hash": {digest.SHA256.Proto(), "xyz", digest.SHA256},
		"nothing to infer from": {unknown, "", digest.SHA256}, "64 digits": {unknown, helloHash, digest.SHA256},
		"40 digits": {unknown, helloHash[:40], digest.SHA1}, "96 digits": {unknown, helloHash + helloHash[:32], digest.SHA384},
		"128 digits": {unknown, helloHash + helloHash, digest.SHA512},
		"sha1":       {digest.SHA1.Proto(), "", digest.SHA1}, "sha384": {digest.SHA384.Proto(), "", digest.SHA384},
		"sha512": {digest.SHA512.Proto(), helloHash, digest.SHA512}, "blake3": {digest.BLAKE3.Proto(), helloHash, digest.BLAKE3},
		"sha256tree": {digest.SHA256TREE.Proto(), helloHash, digest.SHA256TREE},
		"32 digits":  {unknown, helloHash[:32], 0}, "63 digits": {unknown, helloHash[1:], 0}, "1 digit": {unknown, "0", 0},
		"md5": {repb.DigestFunction_MD5, "", 0}, "gitsha1": {repb.DigestFunction_GITSHA1, helloHash[:40], 0},
		"vso": {repb.DigestFunction_VSO, helloHash, 0}, "murmur3": {repb.DigestFunction_MURMUR3, helloHash[:32], 0},
		"unknown number": {77, helloHash, 0}, "negative number": {-1, helloHash, 0},
		"number modulo 256": {256 + digest.BLAKE3.Proto(), helloHash, 0}, "zero modulo 256": {256, helloHash, 0},
	} {
		s, err := digest.SpaceOf("main", test.function, test.hash)
		switch {
		case test.want == 0:
			wantInvalid(t, name, err)
		case err != nil || s.Function() != test.want || s.Instance() != "main":
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

// spaces are one key space for each function.
func spaces(t testing.TB, instance string) []digest.Space {
	t.Helper()
	var out []digest.Space
	for _, f := range digest.Functions() {
		s, err := digest.SpaceOf(instance, f.Proto(), "")
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, s)
	}
	return out
}

func TestFunction(t *testing.T) {
	// The hashes of abc, from FIPS 180-4 and the vectors of BLAKE3.
	abc := map[digest.Function]string{
		digest.SHA256:     "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
		digest.SHA256TREE: "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
		digest.SHA1:       "a9993e364706816aba3e25717850c26c9cd0d89d",
		digest.SHA384:     "cb00753f45a35e8bb5a03d699ac65007272c32ab0eded1631a8b605a43ff5bed8086072ba1e7cc2358baeca134c825a7",
		digest.SHA512: "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a" +
			"2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f",
		digest.BLAKE3: "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85",
	}
	if digest.Functions()[0] != digest.SHA256 || len(digest.Functions()) != len(abc) {
		t.Errorf("functions %v", digest.Functions())
	}
	for _, s := range spaces(t, "x") {
		f := s.Function()
		if f.HexLen() != 2*f.New().Size() || len(f.Empty()) != f.HexLen() || f.HexLen() < 40 || f.HexLen() > digest.MaxHexLen || f.Proto() == repb.DigestFunction_UNKNOWN {
			t.Errorf("%v is not consistent", f)
		}
		if want := strings.ToLower(f.Proto().String()); f.String() != want {
			t.Errorf("name %q, want %q", f, want)
		}
		d := s.Of([]byte("abc"))
		if d.Hash() != abc[f] || d.Size() != 3 {
			t.Errorf("%v of abc is %v", f, d)
		}
		h := f.New()
		for _, c := range []byte("abc") {
			h.Write([]byte{c})
		}
		if sum := s.Sum(h, 3); sum != d {
			t.Errorf("%v byte by byte is %v, want %v", f, sum, d)
		}
		if empty := s.Of(nil); !empty.IsEmpty() || empty.IsImpossible() || empty.Hash() != f.Empty() || d.IsEmpty() {
			t.Errorf("the empty blob of %v is %v", f, empty)
		}
		checkDigest(t, d)
	}
	if digest.Function(99).String() == digest.SHA256.String() {
		t.Error("an unknown function has the name of another")
	}
	var none digest.Space
	if d, err := none.New("", 0); err == nil || (digest.Digest{}).IsEmpty() || d.IsEmpty() {
		t.Error("a Space or a Digest that is none names the empty blob")
	}
}

// TestSHA256TREE compares with the vectors that REAPI publishes, in writes of every shape.
func TestSHA256TREE(t *testing.T) {
	vectors, err := os.ReadFile("testdata/sha256tree.txt")
	if err != nil {
		t.Fatal(err)
	}
	data := make([]byte, 4<<20)
	for i := range data {
		data[i] = byte(i % 251)
	}
	h := digest.SHA256TREE.New()
	seen := 0
	for line := range strings.Lines(string(vectors)) {
		if line[0] == '#' {
			continue
		}
		var size int
		var want string
		if _, err := fmt.Sscan(line, &size, &want); err != nil {
			t.Fatal(err)
		}
		seen++
		for _, step := range []int{size, 1, 64, 1000, 1023, 1024, 1025, 4096, 100_000} {
			if step == 1 && size > 100_000 {
				continue
			}
			h.Reset()
			for rest := data[:size]; len(rest) > 0; rest = rest[min(step, len(rest)):] {
				h.Write(rest[:min(step, len(rest))])
				if len(rest)%7 == 0 && step > 1000 {
					h.Sum(nil) // changes nothing
				}
			}
			if got := hex.EncodeToString(h.Sum(nil)); got != want {
				t.Errorf("%d bytes in writes of %d: %s, want %s", size, step, got, want)
			}
		}
	}
	if seen == 0 {
		t.Error("no vectors")
	}
	// Up to a leaf it is SHA-256.
	for _, size := range []int{0, 1, 1023, 1024} {
		tree, plain := spaces(t, "")[5].Of(data[:size]), space(t, "").Of(data[:size])
		if tree.Hash() != plain.Hash() || tree == plain {
			t.Errorf("%d bytes: %v, SHA-256 is %v", size, tree, plain)
		}
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
		for _, s := range spaces(t, instance) {
			token := strings.Replace(token, "sha256", s.Function().String(), 1)
			if back, err := digest.ParseToken(token); err != nil || back != s || s.Token() != token {
				t.Errorf("%q: parsed as %v, error %v, its token is %q", token, back, err, s.Token())
			}
		}
	}
	for _, token := range []string{
		"", "-", "md5", "unknown", "SHA256", "sha256-", "sha256-=", "sha256-bWFpbg==", "sha256-bWFpbh", "sha256-bWFp bg", "sha256-YS8vYg", "sha256-YmxvYnM",
		"sha256.bWFpbg", "sha256-bWFpbg\n", "sha256-bWFp\nbg", "sha256-bWFp\r\nbg", "BLAKE3-bWFpbg", "-bWFpbg", "sha256-" + strings.Repeat("YWFh", 100), "sha256-_w",
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
