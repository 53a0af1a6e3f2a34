package broker

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
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
	// AtMost makes a worker's property right for every number that is asked for up to Value.
	AtMost bool `json:"at_most,omitempty"`
}

func (p Property) String() string {
	if p.AtMost {
		return p.Name + "<=" + p.Value
	}
	return p.Name + "=" + p.Value
}

// number returns the value of a property that is a number.
func (p Property) number() (float64, bool) {
	n, err := strconv.ParseFloat(p.Value, 64)
	return n, err == nil && n >= 0 && n <= math.MaxFloat64
}

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
	return platform.canonical(), platform.contradiction()
}

// contradiction reports two operating systems, which no worker can be (row EXA-22). Other properties may
// be asked for with several values, all of which a worker must have then.
func (p Platform) contradiction() error {
	family := ""
	for _, property := range p {
		switch {
		case property.Name != familyName:
		case family != "" && !strings.EqualFold(family, property.Value):
			return fmt.Errorf("%w: the platform asks for the %s %s and %s", ErrInvalid, familyName, digest.Quote(family), digest.Quote(property.Value))
		default:
			family = property.Value
		}
	}
	return nil
}

// ParsePlatform returns the platform of name=value and name<=number pairs, as a worker's flags give it. The
// error wraps ErrInvalid.
func ParsePlatform(pairs []string) (Platform, error) {
	if len(pairs) > maxProperties {
		return nil, fmt.Errorf("%w: %d platform properties, at most %d are allowed", ErrInvalid, len(pairs), maxProperties)
	}
	platform := make(Platform, 0, len(pairs))
	for _, pair := range pairs {
		name, value, ok := strings.Cut(pair, "=")
		property := Property{Name: name, Value: value}
		property.Name, property.AtMost = strings.CutSuffix(name, "<")
		if !ok || property.Name == "" || len(pair) > maxPropertyBytes {
			return nil, fmt.Errorf("%w: platform property %.64q is not of the form name=value or name<=number, of at most %d bytes", ErrInvalid, pair, maxPropertyBytes)
		}
		if _, number := property.number(); property.AtMost && !number {
			return nil, fmt.Errorf("%w: platform property %.64q: %.64q is not a number from 0 on", ErrInvalid, pair, value)
		}
		if clientOnly(property.Name) {
			return nil, fmt.Errorf("%w: platform property %.64q: clients use %.64q for themselves, so it chooses no worker", ErrInvalid, pair, property.Name)
		}
		platform = append(platform, property)
	}
	platform = platform.canonical()
	for i := 1; i < len(platform); i++ {
		if this, other := platform[i], platform[i-1]; this.Name == other.Name && (this.AtMost || other.AtMost) {
			return nil, fmt.Errorf("%w: platform properties %.64q and %.64q: a number up to which a worker is right can be given only once", ErrInvalid, other, this)
		}
	}
	return platform, nil
}

// Declares tells whether p has a property of this name.
func (p Platform) Declares(name string) bool {
	return slices.ContainsFunc(p, func(property Property) bool { return property.Name == name })
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
		return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.Value, b.Value), cmp.Compare(strconv.FormatBool(a.AtMost), strconv.FormatBool(b.AtMost)))
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
	return slices.ContainsFunc(p, func(have Property) bool { return have.matches(want) })
}

// matches tells whether a worker with the property p has what is asked for.
func (p Property) matches(want Property) bool {
	switch {
	case p.Name != want.Name:
		return false
	case p.AtMost:
		most, _ := p.number()
		asked, number := want.number()
		return number && asked <= most
	case foldsCase(p.Name):
		return strings.EqualFold(p.Value, want.Value)
	}
	return p.Value == want.Value
}

const familyName = "OSFamily"

func foldsCase(name string) bool { return name == familyName || name == "ISA" }

// bounds tells whether p declares the name as a number up to which it is right.
func (p Platform) bounds(name string) bool {
	return slices.ContainsFunc(p, func(have Property) bool { return have.Name == name && have.AtMost })
}

// unheard is how much a property that a worker does not declare at all counts against the numbers of others.
const unheard = 1e15

// excess is by how much what is asked for exceeds the numbers up to which p is right.
func (p Platform) excess(asked []Property) float64 {
	sum := 0.0
	for _, want := range asked {
		if !p.Declares(want.Name) {
			sum += unheard
		}
		for _, have := range p {
			n, number := want.number()
			if most, _ := have.number(); number && have.AtMost && have.Name == want.Name {
				sum += max(n-most, 0)
			}
		}
	}
	return sum
}

// relevant returns what counts of p: the properties that some worker declares, in the spelling of
// workers and with numbers rounded up to the nearest bound that a worker has, so that the pools are as few
// as the kinds of workers are.
func (p Platform) relevant(declared map[string]bool, workers []Platform) Platform {
	var relevant Platform
	for _, want := range p {
		if declared[want.Name] {
			relevant = append(relevant, want.rounded(workers))
		}
	}
	return relevant.canonical()
}

func (p Property) rounded(workers []Platform) Property {
	if foldsCase(p.Name) {
		p.Value = strings.ToLower(p.Value)
	}
	asked, number := p.number()
	if !number {
		return p
	}
	nearest, bound := p, math.Inf(1)
	for _, worker := range workers {
		for _, have := range worker {
			most, _ := have.number()
			switch {
			case have.Name != p.Name:
			case !have.AtMost:
				return p // it is a name for some worker
			case most >= asked && most < bound:
				nearest, bound = Property{Name: p.Name, Value: have.Value}, most
			}
		}
	}
	return nearest
}

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
		if property.AtMost {
			h.Write([]byte{'<'})
		}
	}
	return hex.EncodeToString(h.Sum(nil)[:8])
}

const defaultPool = "any"

// values renders what p declares under a name.
func (p Platform) values(name string) string {
	var values []string
	for _, property := range p {
		switch {
		case property.Name != name:
		case property.AtMost:
			values = append(values, "up to "+property.Value)
		default:
			values = append(values, digest.Quote(property.Value))
		}
	}
	if len(values) == 0 {
		return "not declared"
	}
	return strings.Join(values, " or ")
}
