package inputs_test

import (
	"errors"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/protobuf/proto"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/worker/inputs"
)

func FuzzLoad(f *testing.F) {
	for _, m := range []*repb.Directory{
		{},
		{Files: []*repb.FileNode{{Name: "../x", Digest: &repb.Digest{}}}},
		{Symlinks: []*repb.SymlinkNode{{Name: "a", Target: "/"}, {Name: "b", Target: "."}}},
	} {
		data, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	space, err := digest.SpaceOf("", repb.DigestFunction_SHA256, "")
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		store := castest.NewMemory()
		root, err := cas.PutBytes(t.Context(), store, space, data)
		if err != nil {
			t.Fatal(err)
		}
		_, err = inputs.NewLoader(store, inputs.DefaultLimits()).Load(t.Context(), root)
		if _, missing := errors.AsType[*inputs.MissingError](err); err != nil && !missing && !errors.Is(err, inputs.ErrInvalid) {
			t.Errorf("error is %v", err)
		}
	})
}
