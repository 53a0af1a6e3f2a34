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

// Read is the meaning of a ByteStream read name.
type Read struct{ Digest Digest }

// Write is the meaning of a ByteStream upload name. Upload is the client's UUID as it was sent; it
// may be used for several blobs at once (row WR-3).
type Write struct {
	Digest Digest
	Upload string
}

// ParseRead parses `{instance/}blobs/{hash}/{size}` and
// `{instance/}compressed-blobs/{compressor}/{hash}/{size}`. The error wraps ErrInvalid and names
// the part that is wrong (rows RD-1, RD-15, RD-16, RD-20).
func ParseRead(name string) (Read, error) {
	segments, at, err := split(name)
	if err != nil {
		return Read{}, err
	}
	if segments[at] == "uploads" {
		return Read{}, fmt.Errorf("%w: resource name %s is an upload, not a blob to read", ErrInvalid, Quote(name))
	}
	d, rest, err := blob(strings.Join(segments[:at], "/"), segments[at:])
	if err != nil {
		return Read{}, fmt.Errorf("resource name %s: %w", Quote(name), err)
	}
	if len(rest) > 0 {
		return Read{}, fmt.Errorf("%w: resource name %s has segments after the size", ErrInvalid, Quote(name))
	}
	return Read{Digest: d}, nil
}

// ParseWrite parses `{instance/}uploads/{uuid}/blobs/{hash}/{size}{/metadata}` and its
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
	d, _, err := blob(strings.Join(segments[:at], "/"), segments[at+2:])
	if err != nil {
		return Write{}, fmt.Errorf("resource name %s: %w", Quote(name), err)
	}
	return Write{Digest: d, Upload: upload}, nil
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

// blob parses what follows the instance name and returns the segments after the size.
func blob(instance string, segments []string) (Digest, []string, error) {
	switch segments[0] {
	case "blobs":
		segments = segments[1:]
	case "compressed-blobs":
		if len(segments) < 2 {
			return Digest{}, nil, fmt.Errorf("%w: the compressor is missing", ErrInvalid)
		}
		return Digest{}, nil, fmt.Errorf("%w: compressor %s is not supported (supported: none, use blobs/)", ErrInvalid, Quote(segments[1]))
	default:
		return Digest{}, nil, fmt.Errorf("%w: %s where blobs or compressed-blobs was expected", ErrInvalid, Quote(segments[0]))
	}
	if len(segments) < 2 {
		return Digest{}, nil, fmt.Errorf("%w: the hash or the size is missing", ErrInvalid)
	}
	hash, size := segments[0], segments[1]
	space, err := SpaceOf(instance, repb.DigestFunction_UNKNOWN, hash)
	if err != nil {
		return Digest{}, nil, err
	}
	n, err := strconv.ParseInt(size, 10, 64)
	if err != nil || n < 0 || strconv.FormatInt(n, 10) != size {
		return Digest{}, nil, fmt.Errorf("%w: size %s is not a plain decimal number of bytes", ErrInvalid, Quote(size))
	}
	d, err := space.New(hash, n)
	return d, segments[2:], err
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
