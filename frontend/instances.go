package frontend

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/jetfarm/jetfarm/cas/digest"
)

// Instances is the list of instance names that are served; nil serves every well formed one. It is
// asked for every call in one place, before a handler sees the request, so that no call forgets it.
type Instances []string

// Validate reports every name that no request can have.
func (i Instances) Validate() error {
	var problems []error
	for _, name := range i {
		if _, err := digest.SpaceOf(name, digest.SHA256.Proto(), ""); err != nil {
			problems = append(problems, err)
		}
	}
	return errors.Join(problems...)
}

// Check refuses an instance name that is not served (row GEN-2). The code is INVALID_ARGUMENT on every
// call: clients take NOT_FOUND for a miss, which would hide a wrong name for ever.
func (i Instances) Check(name string) error {
	if i == nil || slices.Contains(i, name) {
		return nil
	}
	return fmt.Errorf("%w: instance name %s is not served here", errInvalid, digest.Quote(name))
}

// checkRequest is Check for whatever message names an instance.
func (i Instances) checkRequest(message any) error {
	if i == nil {
		return nil
	}
	switch m := message.(type) {
	case interface{ GetInstanceName() string }:
		return i.Check(m.GetInstanceName())
	case interface{ GetResourceName() string }:
		if name := m.GetResourceName(); name != "" { // Later messages of an upload have none.
			return i.Check(instanceOf(name))
		}
	}
	return nil
}

// instanceOf returns what comes before the first word that ends an instance name in a resource name.
// The name may be malformed otherwise, which its handler finds.
func instanceOf(resource string) string {
	end := 0
	for segment := range strings.SplitSeq(resource, "/") {
		switch segment {
		case "uploads", "blobs", "compressed-blobs", "operations":
			return strings.TrimSuffix(resource[:end], "/")
		}
		end += len(segment) + 1
	}
	return ""
}
