package broker

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/jetfarm/jetfarm/cas/digest"
)

// ErrInvalid reports a request that no retry can mend; the text says what to change.
var ErrInvalid = errors.New("invalid request")

// The bounds of a platform that a client may ask for.
const (
	maxProperties    = 64
	maxPropertyBytes = 1024
)

// Property is one platform property, such as OSFamily=linux.
type Property struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

func (p Property) String() string { return p.Name + "=" + p.Value }

// Platform is a set of properties, sorted and without repetition. An action asks for one, a worker
// declares one.
type Platform []Property

// PlatformOf returns what an action asks for. Properties that only steer clients are dropped: they
// never decide which worker is right (row EXA-21). The error wraps ErrInvalid.
func PlatformOf(p *repb.Platform) (Platform, error) {
	properties := p.GetProperties()
	if len(properties) > maxProperties {
		return nil, fmt.Errorf("%w: the platform has %d properties, at most %d are allowed", ErrInvalid, len(properties), maxProperties)
	}
	platform := make(Platform, 0, len(properties))
	for _, property := range properties {
		name, value := property.GetName(), property.GetValue()
		if name == "" || len(name)+len(value) > maxPropertyBytes {
			return nil, fmt.Errorf("%w: platform property %s=%s has no name or more than %d bytes",
				ErrInvalid, digest.Quote(name), digest.Quote(value), maxPropertyBytes)
		}
		if !clientOnly(name) {
			platform = append(platform, Property{Name: name, Value: value})
		}
	}
	return platform.canonical(), nil
}

// ParsePlatform returns the platform of name=value pairs, as a worker's flags give it.
func ParsePlatform(pairs []string) (Platform, error) {
	platform := make(Platform, 0, len(pairs))
	for _, pair := range pairs {
		name, value, ok := strings.Cut(pair, "=")
		if !ok || name == "" {
			return nil, fmt.Errorf("%w: platform property %q is not of the form name=value", ErrInvalid, pair)
		}
		platform = append(platform, Property{Name: name, Value: value})
	}
	return platform.canonical(), nil
}

// clientOnly tells the properties that clients attach for their own use.
func clientOnly(name string) bool {
	switch name {
	case "persistentWorkerKey", "persistentWorkerProtocol", "cache-silo-key", "InputRootAbsolutePath", "supports-workers", "requires-worker-protocol":
		return true
	}
	return strings.HasPrefix(name, "label:")
}

func (p Platform) canonical() Platform {
	slices.SortFunc(p, func(a, b Property) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.Value, b.Value))
	})
	return slices.Compact(p)
}

func (p Platform) String() string {
	if len(p) == 0 {
		return "(no properties)"
	}
	parts := make([]string, len(p))
	for i, property := range p {
		parts[i] = property.String()
	}
	return strings.Join(parts, ", ")
}

// names returns the property names that p declares.
func (p Platform) names(into map[string]bool) {
	for _, property := range p {
		into[property.Name] = true
	}
}

func (p Platform) has(want Property) bool {
	return slices.ContainsFunc(p, func(have Property) bool {
		return have.Name == want.Name && (have.Value == want.Value || (foldsCase(want.Name) && strings.EqualFold(have.Value, want.Value)))
	})
}

func foldsCase(name string) bool { return name == "OSFamily" || name == "ISA" }

// missing returns the properties of asked that a worker with platform p does not have, among those
// that some worker declares. A property that nobody declares does not choose between workers, so it
// is no reason to refuse an action.
func (p Platform) missing(asked Platform, declared map[string]bool) []Property {
	var lacks []Property
	for _, want := range asked {
		if declared[want.Name] && !p.has(want) {
			lacks = append(lacks, want)
		}
	}
	return lacks
}

// pool is the subject token of the jobs that ask for p.
func (p Platform) pool() string {
	if len(p) == 0 {
		return defaultPool
	}
	h := sha256.New()
	for _, property := range p {
		fmt.Fprintf(h, "%d:%s%d:%s", len(property.Name), property.Name, len(property.Value), property.Value)
	}
	return hex.EncodeToString(h.Sum(nil)[:8])
}

const defaultPool = "any"

// values renders what p declares under a name.
func (p Platform) values(name string) string {
	var values []string
	for _, property := range p {
		if property.Name == name {
			values = append(values, digest.Quote(property.Value))
		}
	}
	if len(values) == 0 {
		return "not declared"
	}
	return strings.Join(values, " or ")
}
