package digest_test

import (
	"errors"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/jetfarm/jetfarm/cas/digest"
)

const (
	blob   = "blobs/" + helloHash + "/5"
	upload = "1b4e28ba-2fa1-11d2-883f-0016d3cca427"
)

// badNames are wrong both as the blob part of an upload and as a name to read.
var badNames = map[string]string{
	"no hash":            "blobs",
	"no hash but slash":  "blobs/",
	"no size":            "blobs/" + helloHash,
	"empty size":         "blobs/" + helloHash + "/",
	"empty hash":         "blobs//5",
	"upper case":         "blobs/" + strings.ToUpper(helloHash) + "/5",
	"short hash":         "blobs/" + helloHash[1:] + "/5",
	"long hash":          "blobs/" + helloHash + "0/5",
	"40 digits of many":  "blobs/" + helloHash[:41] + "/5",
	"md5":                "blobs/" + helloHash[:32] + "/5",
	"blake3 with sha1":   "blobs/blake3/" + helloHash[:40] + "/5",
	"blake3 alone":       "blobs/blake3",
	"blake3 no hash":     "blobs/blake3/5",
	"blake3 no size":     "blobs/blake3/" + helloHash,
	"blake3 twice":       "blobs/blake3/blake3/" + helloHash + "/5",
	"two functions":      "blobs/blake3/sha256tree/" + helloHash + "/5",
	"upper blake3":       "blobs/BLAKE3/" + helloHash + "/5",
	"upper sha256tree":   "blobs/Sha256tree/" + helloHash + "/5",
	"named sha1":         "blobs/sha1/" + helloHash[:40] + "/5",
	"named sha384":       "blobs/sha384/" + helloHash + helloHash[:32] + "/5",
	"named sha512":       "blobs/sha512/" + helloHash + helloHash + "/5",
	"named gitsha1":      "blobs/gitsha1/" + helloHash[:40] + "/5",
	"named md5":          "blobs/md5/" + helloHash[:32] + "/5",
	"function is empty":  "blobs//" + helloHash + "/5",
	"identity":           "compressed-blobs/identity/" + helloHash + "/5",
	"gzip":               "compressed-blobs/gzip/" + helloHash + "/5",
	"deflate":            "compressed-blobs/deflate/" + helloHash + "/5",
	"upper zstd":         "compressed-blobs/ZSTD/" + helloHash + "/5",
	"zstd and space":     "compressed-blobs/zstd%20/" + helloHash + "/5",
	"zstd after":         "compressed-blobs/blake3/zstd/" + helloHash + "/5",
	"zstd as blob":       "blobs/zstd/" + helloHash + "/5",
	"zstd twice":         "compressed-blobs/zstd/zstd/" + helloHash + "/5",
	"zstd sha256":        "compressed-blobs/zstd/sha256/" + helloHash + "/5",
	"zstd no size":       "compressed-blobs/zstd/" + helloHash,
	"zstd short hash":    "compressed-blobs/zstd/" + helloHash[1:] + "/5",
	"hash not hex":       "blobs/" + "zz" + helloHash[2:] + "/5",
	"negative size":      "blobs/" + helloHash + "/-5",
	"size minus zero":    "blobs/" + helloHash + "/-0",
	"size with plus":     "blobs/" + helloHash + "/+5",
	"size with zero":     "blobs/" + helloHash + "/05",
	"size in hex":        "blobs/" + helloHash + "/0x5",
	"size with space":    "blobs/" + helloHash + "/ 5",
	"size underscore":    "blobs/" + helloHash + "/1_0",
	"size not a number":  "blobs/" + helloHash + "/five",
	"size too large":     "blobs/" + helloHash + "/9223372036854775808",
	"size fraction":      "blobs/" + helloHash + "/5.0",
	"size unicode":       "blobs/" + helloHash + "/５",
	"doubled slash":      "blobs//" + helloHash + "/5",
	"function component": "blobs/sha256/" + helloHash + "/5",
	"upper function":     "blobs/SHA256/" + helloHash + "/5",
	"compressor":         "compressed-blobs/zip/" + helloHash + "/5",
	"no compressor":      "compressed-blobs/" + helloHash + "/5",
	"compressor only":    "compressed-blobs/zstd",
	"compressed only":    "compressed-blobs",
	"blobs twice":        "blobs/blobs/" + helloHash + "/5",
	"zero byte":          "blobs/" + helloHash + "/5\x00",
	"upper Blobs":        "Blobs/" + helloHash + "/5",
}

// goodNames are names of blobs in every function and form.
func goodNames(t testing.TB) map[string]digest.Read {
	t.Helper()
	long := helloHash + helloHash
	want := func(hash string, f digest.Function, c digest.Compressor) digest.Read {
		s, err := digest.SpaceOf("", f.Proto(), "")
		if err != nil {
			t.Fatal(err)
		}
		d, err := s.New(hash, 5)
		if err != nil {
			t.Fatal(err)
		}
		return digest.Read{Digest: d, Compressor: c}
	}
	names := make(map[string]digest.Read)
	for prefix, c := range map[string]digest.Compressor{"blobs/": digest.Identity, "compressed-blobs/zstd/": digest.Zstd} {
		names[prefix+long[:40]+"/5"] = want(long[:40], digest.SHA1, c)
		names[prefix+long[:64]+"/5"] = want(long[:64], digest.SHA256, c)
		names[prefix+long[:96]+"/5"] = want(long[:96], digest.SHA384, c)
		names[prefix+long+"/5"] = want(long, digest.SHA512, c)
		names[prefix+"blake3/"+long[:64]+"/5"] = want(long[:64], digest.BLAKE3, c)
		names[prefix+"sha256tree/"+long[:64]+"/5"] = want(long[:64], digest.SHA256TREE, c)
	}
	return names
}

// TestParseRead is rows GEN-5, GEN-6, GEN-18, RD-1, RD-15, RD-16 and RD-20.
func TestParseRead(t *testing.T) {
	for _, instance := range []string{"", "main", "a/b/c", "x.y", "über"} {
		name := strings.TrimPrefix(instance+"/"+blob, "/")
		r, err := digest.ParseRead(name)
		if err != nil {
			t.Errorf("%q: %v", name, err)
			continue
		}
		if want := space(t, instance).Of([]byte("hello")); r.Digest != want {
			t.Errorf("%q: %+v, want %v", name, r, want)
		}
		if r.Digest.String() != name || r.Compressor != digest.Identity {
			t.Errorf("%q is printed as %q", name, r.Digest)
		}
	}
	for name, want := range goodNames(t) {
		for _, prefix := range []string{"", "main/", "a/b/"} {
			r, err := digest.ParseRead(prefix + name)
			if err != nil || r.String() != prefix+name || r.Compressor != want.Compressor ||
				r.Digest.Hash() != want.Digest.Hash() || r.Digest.Space().Function() != want.Digest.Space().Function() {
				t.Errorf("%q: %v, error %v", prefix+name, r, err)
			}
		}
	}
	for name, v := range badNames {
		for _, prefix := range []string{"", "main/", "a/b/"} {
			_, err := digest.ParseRead(prefix + v)
			wantInvalid(t, name+" after "+prefix, err)
		}
	}
	for name, v := range map[string]string{
		"empty": "", "slash": "/", "leading slash": "/" + blob, "slash after instance": "main//" + blob, "leading and instance": "/main/" + blob,
		"trailing slash": blob + "/", "more": blob + "/x", "upload": "uploads/" + upload + "/" + blob, "instance upload": "main/uploads/" + upload + "/" + blob,
		"nothing reserved": "main/" + helloHash + "/5", "reserved instance": "operations/" + blob, "inner reserved instance": "a/actions/" + blob,
		"dots": "../" + blob, "too long": strings.Repeat("x/", 3000) + blob, "long instance": strings.Repeat("x", digest.MaxInstance+1) + "/" + blob,
		"not UTF-8": "\xff/" + blob, "control": "a\nb/" + blob, "ten megabytes": strings.Repeat("\xff", 10<<20),
	} {
		_, err := digest.ParseRead(v)
		wantInvalid(t, name, err)
	}
}

// TestParseWrite is rows WR-1, WR-2 and WR-4.
func TestParseWrite(t *testing.T) {
	for _, instance := range []string{"", "main", "a/b/c"} {
		for _, metadata := range []string{"", "/", "/file.txt", "/a/b", "//", "/blobs/x", "/\x00\xff"} {
			for _, id := range []string{upload, strings.ToUpper(upload), "00000000-0000-0000-0000-000000000000"} {
				name := strings.TrimPrefix(instance+"/uploads/"+id+"/"+blob, "/") + metadata
				w, err := digest.ParseWrite(name)
				if err != nil {
					t.Errorf("%q: %v", name, err)
					continue
				}
				if want := space(t, instance).Of([]byte("hello")); w.Digest != want || w.Upload != id {
					t.Errorf("%q: %+v, want %v", name, w, want)
				}
			}
		}
	}
	for name, want := range goodNames(t) {
		for _, prefix := range []string{"", "main/", "a/b/"} {
			again := prefix + "uploads/" + upload + "/" + name
			w, err := digest.ParseWrite(again + "/blobs/x")
			if err != nil || w.String() != again || w.Compressor != want.Compressor || w.Upload != upload ||
				w.Digest.Hash() != want.Digest.Hash() || w.Digest.Space().Function() != want.Digest.Space().Function() {
				t.Errorf("%q: %v, error %v", again, w, err)
			}
		}
	}
	for name, v := range badNames {
		for _, prefix := range []string{"", "main/", "a/b/"} {
			_, err := digest.ParseWrite(prefix + "uploads/" + upload + "/" + v)
			wantInvalid(t, name+" after "+prefix, err)
		}
	}
	for name, v := range map[string]string{
		"empty": "", "blob": blob, "instance blob": "main/" + blob, "uploads": "uploads", "no blob": "uploads/" + upload, "slash": "uploads/" + upload + "/",
		"no id": "uploads/" + blob, "empty id": "uploads//" + blob, "short id": "uploads/1b4e28ba/" + blob, "id without dashes": "uploads/" + strings.ReplaceAll(upload, "-", "") + "/" + blob,
		"id in braces": "uploads/{" + upload + "}/" + blob, "urn": "uploads/urn:uuid:" + upload + "/" + blob, "id not hex": "uploads/g" + upload[1:] + "/" + blob,
		"leading slash": "/uploads/" + upload + "/" + blob, "doubled slash": "main//uploads/" + upload + "/" + blob, "two ids": "uploads/" + upload + "/" + upload + "/" + blob,
		"blobs first": "blobs/uploads/" + upload + "/" + blob, "reserved instance": "capabilities/uploads/" + upload + "/" + blob,
		"too long": "uploads/" + upload + "/" + blob + "/" + strings.Repeat("m", 5000),
	} {
		_, err := digest.ParseWrite(v)
		wantInvalid(t, name, err)
	}
}

func FuzzParseRead(f *testing.F) {
	f.Add(blob)
	f.Add("a/b/" + blob)
	f.Add("über/" + blob)
	for v := range goodNames(f) {
		f.Add("x/" + v)
	}
	for _, v := range badNames {
		f.Add(v)
	}
	f.Fuzz(func(t *testing.T, name string) {
		r, err := digest.ParseRead(name)
		if err != nil {
			checkError(t, err)
			return
		}
		if r.String() != name {
			t.Errorf("%q is printed as %q", name, r)
		}
		checkDigest(t, r.Digest)
	})
}

func FuzzParseWrite(f *testing.F) {
	f.Add("uploads/" + upload + "/" + blob)
	f.Add("a/b/uploads/" + upload + "/" + blob + "/metadata/x")
	for v := range goodNames(f) {
		f.Add("x/uploads/" + upload + "/" + v + "/x")
	}
	for _, v := range badNames {
		f.Add("main/uploads/" + upload + "/" + v)
	}
	f.Fuzz(func(t *testing.T, name string) {
		w, err := digest.ParseWrite(name)
		if err != nil {
			checkError(t, err)
			return
		}
		again := w.String()
		if metadata, ok := strings.CutPrefix(name, again); !ok || (metadata != "" && metadata[0] != '/') {
			t.Errorf("%q is printed as %q", name, again)
		}
		checkDigest(t, w.Digest)
	})
}

func FuzzParseToken(f *testing.F) {
	for _, token := range []string{"sha256", "sha256-bWFpbg", "sha256-YS9i", "sha256-Ki4-", "sha256-", "blake3", "sha256tree-YS9i", "sha1", "sha512-eA", "sha256-bWFpbh", "sha256-bWFp\nbg"} {
		f.Add(token)
	}
	f.Fuzz(func(t *testing.T, token string) {
		s, err := digest.ParseToken(token)
		if err != nil {
			checkError(t, err)
			return
		}
		if s.Token() != token {
			t.Errorf("%q is printed as %q", token, s.Token())
		}
		checkDigest(t, s.Of([]byte("hello")))
	})
}

func checkError(t *testing.T, err error) {
	t.Helper()
	if !errors.Is(err, digest.ErrInvalid) || !utf8.ValidString(err.Error()) || len(err.Error()) > 4<<10 {
		t.Errorf("error %q", err)
	}
}

// checkDigest checks what code relies on that has a Digest.
func checkDigest(t *testing.T, d digest.Digest) {
	t.Helper()
	if len(d.Hash()) != d.Space().Function().HexLen() || strings.Trim(d.Hash(), "0123456789abcdef") != "" || d.Size() < 0 {
		t.Errorf("%v is not well formed", d)
	}
	if again, err := d.Space().Parse(d.Proto()); err != nil || again != d {
		t.Errorf("%v is parsed as %v from its message, error %v", d, again, err)
	}
	if again, err := digest.ParseRead(d.String()); err != nil || again.Digest != d {
		t.Errorf("%v is parsed as %v from its name, error %v", d, again.Digest, err)
	}
	token := d.Space().Token()
	if again, err := digest.ParseToken(token); err != nil || again != d.Space() {
		t.Errorf("%q is parsed as %v, error %v", token, again, err)
	}
	if strings.Trim(token, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_") != "" {
		t.Errorf("%q is no subject token", token)
	}
}
