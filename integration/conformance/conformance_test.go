package conformance_test

import (
	"flag"
	"os"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"

	"github.com/jetfarm/jetfarm/integration/conformance"
)

var update = flag.Bool("update", false, "rewrite docs/CONFORMANCE.md")

const document = "../../docs/CONFORMANCE.md"

func TestDocumentIsCurrent(t *testing.T) {
	want, err := conformance.Table(os.DirFS("../.."))
	if err != nil {
		t.Fatal(err)
	}
	if *update {
		if err := os.WriteFile(document, want, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(document)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("docs/CONFORMANCE.md is stale, run make conformance (-want +got):\n%s", diff)
	}
}

const claiming = `package p_test

import "testing"

func TestRD_4_RD_7_Limits(t *testing.T) { t.Run("no rows here: RD-1", nil) }

func TestTables(t *testing.T) {
	for name := range rows() {
		t.Run(name, nil)
	}
	t.Run("X-1 GEN-8 "+"upper case", nil)
	t.Run("UTF-8 is no row", nil)
}

func rows() map[string]int { return map[string]int{"WR-15": 0, "QWS-2, QWS-4 status": 1} }
`

func TestFindClaims(t *testing.T) {
	rows, err := conformance.Rows()
	if err != nil {
		t.Fatal(err)
	}
	got, err := conformance.FindClaims(fstest.MapFS{
		"a/a_test.go":            {Data: []byte(claiming)},
		"a/testdata/bad_test.go": {Data: []byte("no Go")},
		"a/a.go":                 {Data: []byte("package p\n\nfunc RD_5() string { return \"RD-6 is not in a test\" }")},
	}, rows)
	if err != nil {
		t.Fatal(err)
	}
	table, limits := []conformance.Test{{File: "a/a_test.go", Name: "TestTables"}}, []conformance.Test{{File: "a/a_test.go", Name: "TestRD_4_RD_7_Limits"}}
	want := conformance.Claims{
		"RD-4": limits, "RD-7": limits, "X-1": table, "GEN-8": table, "WR-15": table, "QWS-2": table, "QWS-4": table,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("claims (-want +got):\n%s", diff)
	}
	_, err = conformance.FindClaims(fstest.MapFS{"a_test.go": {Data: []byte("package p\n\nfunc TestRD_99(*testing.T) {}")}}, rows)
	if err == nil {
		t.Error("a test may name RD-99, which is not a row")
	}
}
