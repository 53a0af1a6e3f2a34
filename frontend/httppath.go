package frontend

import (
	"fmt"
	"net/url"
	"strings"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/jetfarm/jetfarm/cas/digest"
)

// The two parts of the HTTP cache, as they are called in its paths.
const (
	httpActions = "ac"
	httpBlobs   = "cas"
)

// httpName is what a path of the HTTP cache names.
type httpName struct {
	store string // httpActions or httpBlobs
	space digest.Space
	hash  string
}

// httpCachePath tells whether an escaped path belongs to the HTTP cache, and cuts it into the instance
// name, still escaped, the store, the digest function, which may be empty, and the hash. The function
// is written before the hash, as in ByteStream names, or before the store, where a client that only
// knows a base URL can put it:
//
//	/{instance/}{function/}(ac|cas)/{function/}{hash}
func httpCachePath(escaped string) (instance []string, store, function, hash string, ok bool) {
	rest, rooted := strings.CutPrefix(escaped, "/")
	segments := strings.Split(rest, "/")
	at := len(segments) - 2
	if !rooted || at < 0 {
		return nil, "", "", "", false
	}
	if isFunction(segments[at]) && at > 0 {
		function = segments[at]
		at--
	}
	if segments[at] != httpActions && segments[at] != httpBlobs {
		return nil, "", "", "", false
	}
	instance = segments[:at]
	if n := len(instance); function == "" && n > 0 && isFunction(instance[n-1]) {
		instance, function = instance[:n-1], instance[n-1]
	}
	return instance, segments[at], function, segments[len(segments)-1], true
}

func isFunction(name string) bool { return functionOf(name) != repb.DigestFunction_UNKNOWN }

// functionOf returns the supported digest function of this name, or UNKNOWN.
func functionOf(name string) repb.DigestFunction_Value {
	for _, f := range digest.Functions() {
		if f.String() == name {
			return f.Proto()
		}
	}
	return repb.DigestFunction_UNKNOWN
}

// parseHTTPName checks the parts of a path. Nothing in it is a file name or a redirect, and nothing is
// cleaned: a segment that is empty, a dot or two, or has an escaped slash is refused as in any other
// instance name.
func parseHTTPName(instance []string, store, function, hash string) (httpName, error) {
	names := make([]string, len(instance))
	for i, escaped := range instance {
		name, err := url.PathUnescape(escaped)
		if err != nil || strings.Contains(name, "/") {
			return httpName{}, fmt.Errorf("%w: path segment %s", errInvalid, digest.Quote(escaped))
		}
		if name == "" {
			return httpName{}, fmt.Errorf("%w: the path has an empty segment", errInvalid)
		}
		names[i] = name
	}
	space, err := digest.SpaceOf(strings.Join(names, "/"), functionOf(function), hash)
	if err != nil {
		return httpName{}, err
	}
	if _, err := space.New(hash, 1); err != nil {
		return httpName{}, err
	}
	return httpName{store: store, space: space, hash: hash}, nil
}
