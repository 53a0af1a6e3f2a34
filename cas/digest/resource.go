package digest

import (
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/uuid"
)

// MaxInstance is the longest instance name in bytes.
const MaxInstance = 256

// maxResource bounds a resource name: an instance, an upload id, a digest and optional metadata.
const maxResource = 4096

// Compressor is the form in which the bytes of a blob travel.
type Compressor uint8

// The compressors that resource names may have.
const (
	Identity = Compressor(repb.Compressor_IDENTITY)
	Zstd     = Compressor(repb.Compressor_ZSTD)
)

// Read is the meaning of a ByteStream read name.
type Read struct {
	Digest     Digest
	Compressor Compressor
}

// String returns the name that ParseRead parses as r.
func (r Read) String() string {
	return r.Digest.space.prefix() + r.Compressor.segments() + r.Digest.path()
}

// Write is the meaning of a ByteStream upload name. Upload is the client's UUID as it was sent; it
// may be used for several blobs at once (row WR-3).
type Write struct {
	Digest     Digest
	Upload     string
	Compressor Compressor
}

// String returns a name that ParseWrite parses as w.
func (w Write) String() string {
	return w.Digest.space.prefix() + "uploads/" + w.Upload + "/" + w.Compressor.segments() + w.Digest.path()
}

func (c Compressor) segments() string {
	if c == Zstd {
		return "compressed-blobs/zstd/"
	}
	return "blobs/"
}

// ParseRead parses `{instance/}blobs/{function/}{hash}/{size}` and
// `{instance/}compressed-blobs/{compressor}/{function/}{hash}/{size}`. The error wraps ErrInvalid and
// names the part that is wrong (rows RD-1, RD-15, RD-16, RD-20).
func ParseRead(name string) (Read, error) {
	segments, at, err := split(name)
	if err != nil {
		return Read{}, err
	}
	if segments[at] == "uploads" {
		return Read{}, fmt.Errorf("%w: resource name %s is an upload, not a blob to read", ErrInvalid, Quote(name))
	}
	d, compressor, rest, err := blob(strings.Join(segments[:at], "/"), segments[at:])
	if err != nil {
		return Read{}, fmt.Errorf("resource name %s: %w", Quote(name), err)
	}
	if len(rest) > 0 {
		return Read{}, fmt.Errorf("%w: resource name %s has segments after the size", ErrInvalid, Quote(name))
	}
	return Read{Digest: d, Compressor: compressor}, nil
}

// ParseWrite parses `{instance/}uploads/{uuid}/blobs/{function/}{hash}/{size}{/metadata}` and its
// compressed-blobs form. Metadata is ignored. The error wraps ErrInvalid (rows WR-1, WR-2, WR-4).
func ParseWrite(name string) (Write, error) {
	segments, at, err := split(name)
	if err != nil {
		return Write{}, err
	}
	if segments[at] != "uploads" || len(segments) < at+3 {
		return Write{}, fmt.Errorf("%w: resource name %s is not {instance/}uploads/{uuid}/blobs/{hash}/{size}", ErrInvalid, Quote(name))
	}
	upload := segments[at+1]
	if len(upload) != 36 || uuid.Validate(upload) != nil {
		return Write{}, fmt.Errorf("%w: resource name %s: %s is not a UUID", ErrInvalid, Quote(name), Quote(upload))
	}
	d, compressor, _, err := blob(strings.Join(segments[:at], "/"), segments[at+2:])
	if err != nil {
		return Write{}, fmt.Errorf("resource name %s: %w", Quote(name), err)
	}
	return Write{Digest: d, Upload: upload, Compressor: compressor}, nil
}

// split cuts a name into segments and finds the first reserved one, which ends the instance name.
func split(name string) (segments []string, at int, err error) {
	if len(name) > maxResource {
		return nil, 0, fmt.Errorf("%w: resource name %s has %d bytes, at most %d are allowed", ErrInvalid, Quote(name), len(name), maxResource)
	}
	segments = strings.Split(name, "/")
	for i, s := range segments {
		switch s {
		case "uploads", "blobs", "compressed-blobs":
			if i == 1 && segments[0] == "" {
				return nil, 0, fmt.Errorf("%w: resource name %s starts with a slash", ErrInvalid, Quote(name))
			}
			return segments, i, nil
		}
	}
	return nil, 0, fmt.Errorf("%w: resource name %s has no segment blobs, compressed-blobs or uploads", ErrInvalid, Quote(name))
}

// blob parses what follows the instance name and returns the segments after the size. The digest
// function has a segment only if its name cannot be left out (row GEN-18).
func blob(instance string, segments []string) (Digest, Compressor, []string, error) {
	compressor, segments, err := compressorOf(segments)
	if err != nil {
		return Digest{}, 0, nil, err
	}
	function := repb.DigestFunction_UNKNOWN
	if len(segments) > 0 {
		if f := functionNamed(segments[0]); f.component() != "" {
			function, segments = f.Proto(), segments[1:]
		} else if f.supported() {
			return Digest{}, 0, nil, fmt.Errorf("%w: the digest function %v must be left out, the length of the hash tells it", ErrInvalid, f)
		}
	}
	if len(segments) < 2 {
		return Digest{}, 0, nil, fmt.Errorf("%w: the hash or the size is missing", ErrInvalid)
	}
	hash, size := segments[0], segments[1]
	if hash == "" {
		return Digest{}, 0, nil, fmt.Errorf("%w: the hash is empty", ErrInvalid)
	}
	space, err := SpaceOf(instance, function, hash)
	if err != nil {
		return Digest{}, 0, nil, err
	}
	n, err := strconv.ParseInt(size, 10, 64)
	if err != nil || n < 0 || strconv.FormatInt(n, 10) != size {
		return Digest{}, 0, nil, fmt.Errorf("%w: size %s is not a plain decimal number of bytes", ErrInvalid, Quote(size))
	}
	d, err := space.New(hash, n)
	return d, compressor, segments[2:], err
}

// compressorOf parses `blobs` or `compressed-blobs/{compressor}` and returns what follows. Blobs
// without a compressor have the first form only (row RD-16).
func compressorOf(segments []string) (Compressor, []string, error) {
	switch {
	case segments[0] == "blobs":
		return Identity, segments[1:], nil
	case segments[0] != "compressed-blobs":
		return 0, nil, fmt.Errorf("%w: %s where blobs or compressed-blobs was expected", ErrInvalid, Quote(segments[0]))
	case len(segments) < 2:
		return 0, nil, fmt.Errorf("%w: the compressor is missing", ErrInvalid)
	case segments[1] != "zstd":
		return 0, nil, fmt.Errorf("%w: compressor %s is not supported (supported: zstd, and blobs/ for none)", ErrInvalid, Quote(segments[1]))
	}
	return Zstd, segments[2:], nil
}

func checkInstance(name string) error {
	if name == "" {
		return nil
	}
	if len(name) > MaxInstance {
		return fmt.Errorf("%w: instance name %s has %d bytes, at most %d are allowed", ErrInvalid, Quote(name), len(name), MaxInstance)
	}
	if !utf8.ValidString(name) {
		return fmt.Errorf("%w: instance name %s is not UTF-8", ErrInvalid, Quote(name))
	}
	for segment := range strings.SplitSeq(name, "/") {
		switch segment {
		case "":
			return fmt.Errorf("%w: instance name %s has an empty segment", ErrInvalid, Quote(name))
		case ".", "..", "blobs", "uploads", "actions", "actionResults", "operations", "capabilities", "compressed-blobs":
			return fmt.Errorf("%w: instance name %s has the reserved segment %s", ErrInvalid, Quote(name), Quote(segment))
		}
	}
	for _, r := range name {
		if r < ' ' || r == 0x7f {
			return fmt.Errorf("%w: instance name %s has a control character", ErrInvalid, Quote(name))
		}
	}
	return nil
}
