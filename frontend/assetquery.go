package frontend

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	remoteasset "github.com/bazelbuild/remote-apis/build/bazel/remote/asset/v1"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/net/http/httpguts"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/asset"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/frontend/fetch"
)

// The qualifiers that say something to this service; headers have names that begin like these.
const (
	qualifierChecksum  = "checksum.sri"
	qualifierCanonical = "bazel.canonical_id"
	qualifierAuth      = "bazel.auth_headers"
	qualifierHeader    = "http_header:"
	qualifierHeaderURL = "http_header_url:"
	qualifierType      = "resource_type"
	qualifierDirectory = "directory"
)

// Bounds of what names an asset.
const (
	maxURIs            = 100
	maxURIBytes        = 16 << 10
	maxQualifiers      = 200
	maxQualifierBytes  = 64 << 10
	maxAssetReferences = 1000
)

// unsupportedError reports qualifiers that nothing is known of (row AST-2).
type unsupportedError struct{ names []string }

func (e *unsupportedError) Error() string {
	return fmt.Sprintf("qualifier %s is not supported, and nothing was pushed with it", digest.Quote(e.names[0]))
}

func (*unsupportedError) Unwrap() error { return errInvalid }

// assetQuery is a request for an asset, checked.
type assetQuery struct {
	kind       asset.Kind
	space      digest.Space
	uris       []string
	qualifiers []asset.Qualifier // all of them
	timeout    time.Duration     // 0 for none
	oldest     time.Time         // zero accepts content of any age

	checksums   fetch.Checksums
	canonical   bool
	directory   string
	headers     http.Header         // for every URI
	headersOf   map[int]http.Header // by index of the URI
	unsupported []string
}

// assetRequest is what both Fetch requests have.
type assetRequest interface { //nolint:interfacebloat // the getters of a message
	GetInstanceName() string
	GetDigestFunction() repb.DigestFunction_Value
	GetUris() []string
	GetQualifiers() []*remoteasset.Qualifier
	GetTimeout() *durationpb.Duration
	GetOldestContentAccepted() *timestamppb.Timestamp
}

// query checks a request. A digest function that is not set is SHA256 (row AST-7).
func (a *assets) query(kind asset.Kind, req assetRequest) (*assetQuery, error) {
	fn := req.GetDigestFunction()
	if fn == repb.DigestFunction_UNKNOWN {
		fn = repb.DigestFunction_SHA256
	}
	space, err := digest.SpaceOf(req.GetInstanceName(), fn, "")
	if err != nil {
		return nil, err
	}
	q := &assetQuery{kind: kind, space: space, uris: req.GetUris(), headers: http.Header{}, headersOf: map[int]http.Header{}}
	if q.qualifiers, err = checkAssetName(q.uris, req.GetQualifiers()); err != nil {
		return nil, err
	}
	if t := req.GetTimeout(); t != nil {
		if t.CheckValid() != nil || t.AsDuration() < 0 {
			return nil, fmt.Errorf("%w: timeout %s", errInvalid, durationText(t))
		}
		q.timeout = t.AsDuration()
	}
	if t := req.GetOldestContentAccepted(); t != nil {
		if err := t.CheckValid(); err != nil {
			return nil, fmt.Errorf("%w: oldest_content_accepted is no valid time", errInvalid)
		}
		q.oldest = t.AsTime()
	}
	for _, qualifier := range q.qualifiers {
		if err := q.take(qualifier); err != nil {
			return nil, fmt.Errorf("%w: qualifier %s: %w", errInvalid, digest.Quote(qualifier.Name), err)
		}
	}
	return q, nil
}

// checkAssetName checks what names an asset in all four requests (row AST-1).
func checkAssetName(uris []string, qualifiers []*remoteasset.Qualifier) ([]asset.Qualifier, error) {
	switch {
	case len(uris) == 0:
		return nil, fmt.Errorf("%w: uris is empty", errInvalid)
	case len(uris) > maxURIs:
		return nil, fmt.Errorf("%w: there are %d uris, at most %d are allowed", errInvalid, len(uris), maxURIs)
	case len(qualifiers) > maxQualifiers:
		return nil, fmt.Errorf("%w: there are %d qualifiers, at most %d are allowed", errInvalid, len(qualifiers), maxQualifiers)
	}
	for i, uri := range uris {
		if uri == "" || len(uri) > maxURIBytes {
			return nil, fmt.Errorf("%w: uris[%d] has %d bytes, from 1 to %d are allowed", errInvalid, i, len(uri), maxURIBytes)
		}
	}
	seen := make(map[string]bool, len(qualifiers))
	out := make([]asset.Qualifier, len(qualifiers))
	for i, q := range qualifiers {
		name := q.GetName()
		switch {
		case name == "":
			return nil, fmt.Errorf("%w: qualifiers[%d] has no name", errInvalid, i)
		case len(name)+len(q.GetValue()) > maxQualifierBytes:
			return nil, fmt.Errorf("%w: qualifier %s has more than %d bytes", errInvalid, digest.Quote(name), maxQualifierBytes)
		case seen[name]:
			return nil, fmt.Errorf("%w: qualifier %s comes twice", errInvalid, digest.Quote(name))
		}
		seen[name] = true
		out[i] = asset.Qualifier{Name: name, Value: q.GetValue()}
	}
	return out, nil
}

// take takes in one qualifier (row AST-10).
func (q *assetQuery) take(qualifier asset.Qualifier) (err error) {
	name, value := qualifier.Name, qualifier.Value
	switch {
	case name == qualifierChecksum:
		q.checksums, err = fetch.ParseChecksums(value)
	case name == qualifierCanonical:
		q.canonical = value != ""
	case name == qualifierAuth:
		err = q.takeAuth(value)
	case strings.HasPrefix(name, qualifierHeaderURL):
		index, header, _ := strings.Cut(name[len(qualifierHeaderURL):], ":")
		n, bad := strconv.Atoi(index)
		if bad != nil || n < 0 || n >= len(q.uris) {
			return fmt.Errorf("%s is not the index of a URI", digest.Quote(index))
		}
		err = q.addHeader(n, header, value)
	case strings.HasPrefix(name, qualifierHeader):
		err = setHeader(q.headers, name[len(qualifierHeader):], value)
	case name == qualifierDirectory && q.kind == asset.Directory:
		q.directory = value
	case name == qualifierType && q.kind == asset.Directory && slices.Contains(archiveTypes, value):
	default:
		q.unsupported = append(q.unsupported, name)
	}
	return err
}

// archiveTypes are the values of resource_type that say no more than what the content says by itself.
var archiveTypes = []string{ //nolint:gochecknoglobals // a table that nothing changes
	"application/x-tar", "application/gzip", "application/x-gzip", "application/zstd", "application/x-bzip2", "application/zip",
}

// takeAuth takes in Bazel's map of URLs to maps of headers. Only those for a URI of the request count.
func (q *assetQuery) takeAuth(value string) error {
	var headers map[string]map[string]json.RawMessage
	if err := json.Unmarshal([]byte(value), &headers); err != nil {
		return errors.New("it is not a JSON object of objects")
	}
	for i, uri := range q.uris {
		for name, raw := range headers[uri] {
			var values []string
			if err := json.Unmarshal(raw, &values); err != nil {
				values = make([]string, 1)
				if json.Unmarshal(raw, &values[0]) != nil {
					return errors.New("a header is neither a text nor a list of texts")
				}
			}
			for _, v := range values {
				if err := q.addHeader(i, name, v); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

func (q *assetQuery) addHeader(uri int, name, value string) error {
	if q.headersOf[uri] == nil {
		q.headersOf[uri] = http.Header{}
	}
	return setHeader(q.headersOf[uri], name, value)
}

// setHeader adds a header that a client may set. Those of the connection, and what changes which bytes
// come, are the fetcher's.
func setHeader(h http.Header, name, value string) error {
	if !httpguts.ValidHeaderFieldName(name) || !httpguts.ValidHeaderFieldValue(value) {
		return errors.New("it is not a valid HTTP header")
	}
	switch canonical := http.CanonicalHeaderKey(name); canonical {
	case "Host", "Connection", "Content-Length", "Transfer-Encoding", "Te", "Trailer", "Upgrade", "Keep-Alive", "Expect",
		"Proxy-Connection", "Proxy-Authorization", "Range", "If-Range", "If-None-Match", "If-Modified-Since":
		return fmt.Errorf("header %s may not be set", canonical)
	}
	h.Add(name, value)
	return nil
}

// header is what is sent to a URI.
func (q *assetQuery) header(uri int) http.Header {
	h := q.headers.Clone()
	maps.Copy(h, q.headersOf[uri])
	return h
}

// identity returns the qualifiers that are a part of an asset's name. How to get the content is none
// when a checksum says which it is; without one, what a client gets with its credentials is found only
// by who has the same.
func identity(qualifiers []asset.Qualifier) []asset.Qualifier {
	if !slices.ContainsFunc(qualifiers, func(q asset.Qualifier) bool { return q.Name == qualifierChecksum }) {
		return qualifiers
	}
	return slices.DeleteFunc(slices.Clone(qualifiers), func(q asset.Qualifier) bool {
		return q.Name == qualifierAuth || strings.HasPrefix(q.Name, qualifierHeader) || strings.HasPrefix(q.Name, qualifierHeaderURL)
	})
}

func (q *assetQuery) name(uri int) asset.Name {
	return asset.Name{Space: q.space, Kind: q.kind, URI: q.uris[uri], Qualifiers: identity(q.qualifiers)}
}

// key is the same for requests that one download can answer.
func (q *assetQuery) key() string {
	sorted := slices.SortedFunc(slices.Values(q.qualifiers), func(a, b asset.Qualifier) int { return strings.Compare(a.Name, b.Name) })
	return fmt.Sprintf("%s %s %q %q %v %v", q.kind, q.space.Token(), q.uris, sorted, q.timeout, q.oldest.UnixNano())
}

func isNotFound(err error) bool {
	return errors.Is(err, cas.ErrNotFound) || errors.Is(err, asset.ErrNotFound)
}
