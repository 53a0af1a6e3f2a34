package integration_test

import (
	"bytes"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"
)

const (
	modulePath = "github.com/jetfarm/jetfarm"
	// maxLines is where a file has become more than one job.
	maxLines = 500
)

// A packageRule says what the files of a package that are not tests may import. A folder without a
// rule of its own has that of the nearest folder above.
type packageRule struct {
	own      []string // packages of this module, by folder; "..." is all of them
	restrict []string // those of restrictedImports that are allowed
}

// restrictedImports are import path prefixes that only a package whose rule names them may use.
var restrictedImports = []string{grpcImport, natsImport}

const (
	grpcImport = "google.golang.org/grpc"
	natsImport = "github.com/nats-io/"
)

var packageRules = map[string]packageRule{
	"cas/digest":        {},
	"cas":               {own: []string{"cas/digest", "cas/compress"}},
	"cas/compress":      {},
	"cas/chunking":      {own: []string{"cas", "cas/digest"}},
	"cas/memory":        {own: []string{"cas", "cas/digest", "cas/pack"}},
	"cas/castest":       {own: []string{"cas", "cas/digest", "cas/compress"}},
	"cas/disk":          {own: []string{"cas", "cas/digest", "cas/compress"}},
	"cas/keymap":        {own: []string{"cas/digest"}},
	"cas/pack":          {own: []string{"cas/digest", "cas/keymap"}},
	"cas/objectstore":   {own: []string{"cas", "cas/digest", "cas/compress", "cas/keymap"}, restrict: []string{natsImport}},
	"cas/actioncache":   {own: []string{"cas", "cas/digest"}, restrict: []string{natsImport}},
	"cas/asset":         {own: []string{"cas", "cas/digest"}, restrict: []string{natsImport}},
	"cas/upstream":      {own: []string{"cas", "cas/digest", "cas/compress", "cas/actioncache"}, restrict: []string{grpcImport}},
	"broker":            {own: []string{"cas/digest"}, restrict: []string{natsImport}},
	"broker/brokertest": {own: []string{"broker", "cas/digest"}, restrict: []string{natsImport}},
	"worker":            {own: []string{"worker", "broker", "cas", "cas/digest", "cas/disk", "cas/actioncache"}},
	"frontend": {
		own:      []string{"frontend", "broker", "cas", "cas/digest", "cas/compress", "cas/chunking", "cas/disk", "cas/actioncache", "cas/asset"},
		restrict: []string{grpcImport},
	},
	"frontend/spool":  {},
	"frontend/fetch":  {own: []string{"frontend/spool"}},
	"frontend/unpack": {own: []string{"cas", "cas/digest", "frontend/spool"}},
	"cmd":             {own: []string{"..."}, restrict: restrictedImports},
	"cmd/run":         {restrict: restrictedImports},
	"cmd/jetfarm":     {own: []string{"cmd/app", "cmd/run"}},
	"integration":     {own: []string{"..."}, restrict: restrictedImports},
}

// testsNeverImport are the sides that do not know each other, not even in their tests.
var testsNeverImport = map[string]string{"worker": "frontend", "frontend": "worker"}

func TestArchitectureOfThisModule(t *testing.T) {
	problems, err := checkArchitecture(os.DirFS(".."))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Error(p)
	}
}

// A check that cannot fail is worse than none: the tree in testdata breaks every rule once.
func TestArchitectureRulesAreEnforced(t *testing.T) {
	got, err := checkArchitecture(os.DirFS("testdata/arch"))
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"broker/broker.go:6: imports cas, which broker may not",
		"broker/doc.go:2: package comment must begin with \"Package broker\"",
		"cas/disk/disk.go:5: imports google.golang.org/grpc/codes, which cas/disk may not",
		"cas/disk: no doc.go with a package comment",
		"frontend/frontend.go:3: imports worker, which frontend may not",
		"frontend/frontend_test.go:3: imports worker, which no file of frontend may",
		"util: no import rule for this folder; add one to packageRules",
		"worker/worker.go:4: imports github.com/nats-io/nats.go, which worker may not",
		"worker/worker.go:12: go statement; use an errgroup that this function waits for",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("problems of testdata/arch (-want +got):\n%s", diff)
	}
}

func TestArchitectureRefusesLongFiles(t *testing.T) {
	long := "package cas\n" + strings.Repeat("\n", maxLines)
	got, err := checkArchitecture(fstest.MapFS{
		"cas/doc.go":      {Data: []byte("// Package cas is a test.\npackage cas\n")},
		"cas/long.go":     {Data: []byte(long)},
		"cas/at_limit.go": {Data: []byte(long[:len(long)-1])},
	})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"cas/long.go: 501 lines, at most 500"}, got); diff != "" {
		t.Errorf("problems (-want +got):\n%s", diff)
	}
}

// checkArchitecture returns what is wrong with the packages below root, in the order of the files.
func checkArchitecture(root fs.FS) ([]string, error) {
	var problems []string
	err := fs.WalkDir(root, ".", func(name string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if !entry.IsDir() {
			return nil
		}
		base := path.Base(name)
		if name != "." && (base == "testdata" || base == "bin" || strings.HasPrefix(base, ".") || strings.HasPrefix(base, "_")) {
			return fs.SkipDir
		}
		found, err := checkFolder(root, name)
		problems = append(problems, found...)
		return err
	})
	return problems, err
}

func checkFolder(root fs.FS, folder string) ([]string, error) {
	files, err := fs.Glob(root, path.Join(folder, "*.go"))
	if err != nil || len(files) == 0 {
		return nil, err
	}
	rule, ok := ruleOf(folder)
	if !ok {
		return []string{folder + ": no import rule for this folder; add one to packageRules"}, nil
	}
	var problems []string
	documented := false
	for _, name := range files {
		source, err := fs.ReadFile(root, name)
		if err != nil {
			return nil, err
		}
		if lines := bytes.Count(source, []byte("\n")); lines > maxLines {
			problems = append(problems, fmt.Sprintf("%s: %d lines, at most %d", name, lines, maxLines))
		}
		positions := token.NewFileSet()
		file, err := parser.ParseFile(positions, name, source, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return nil, errors.Join(err, errors.New(name))
		}
		report := func(node ast.Node, format string, args ...any) {
			at := name + ":" + strconv.Itoa(positions.Position(node.Pos()).Line) + ": "
			problems = append(problems, at+fmt.Sprintf(format, args...))
		}
		if path.Base(name) == "doc.go" {
			documented = true
			checkDoc(file, report)
		}
		if strings.HasSuffix(name, "_test.go") {
			checkTestImports(file, folder, report)
			continue
		}
		checkImports(file, folder, rule, report)
		// A suite that other packages' tests call, such as castest, is test code as well.
		if !strings.HasSuffix(file.Name.Name, "test") {
			checkGoStatements(file, report)
		}
	}
	if !documented {
		problems = append(problems, folder+": no doc.go with a package comment")
	}
	return problems, nil
}

type reporter func(node ast.Node, format string, args ...any)

func checkDoc(file *ast.File, report reporter) {
	want := "Package " + file.Name.Name
	if file.Name.Name == "main" {
		want = "Command "
	}
	if file.Doc == nil || !strings.HasPrefix(file.Doc.Text(), want) {
		report(file, "package comment must begin with %q", want)
	}
}

func checkImports(file *ast.File, folder string, rule packageRule, report reporter) {
	for _, spec := range file.Imports {
		imported := importPath(spec)
		if own, ok := strings.CutPrefix(imported, modulePath+"/"); ok {
			if !slices.Contains(rule.own, "...") && !slices.ContainsFunc(rule.own, func(allowed string) bool {
				// A package may use those below its own folder that its rule covers.
				return own == allowed || (allowed == topFolder(folder) && strings.HasPrefix(own, allowed+"/"))
			}) {
				report(spec, "imports %s, which %s may not", own, folder)
			}
			continue
		}
		for _, prefix := range restrictedImports {
			if within(imported, prefix) && !slices.Contains(rule.restrict, prefix) {
				report(spec, "imports %s, which %s may not", imported, folder)
			}
		}
	}
}

func checkTestImports(file *ast.File, folder string, report reporter) {
	side := topFolder(folder)
	for _, spec := range file.Imports {
		own, ok := strings.CutPrefix(importPath(spec), modulePath+"/")
		if ok && topFolder(own) == testsNeverImport[side] {
			report(spec, "imports %s, which no file of %s may", own, side)
		}
	}
}

func checkGoStatements(file *ast.File, report reporter) {
	ast.Inspect(file, func(node ast.Node) bool {
		if statement, ok := node.(*ast.GoStmt); ok {
			report(statement, "go statement; use an errgroup that this function waits for")
		}
		return true
	})
}

// ruleOf returns the rule of the folder or of the nearest one above it that has one.
func ruleOf(folder string) (packageRule, bool) {
	for f := folder; f != "." && f != "/"; f = path.Dir(f) {
		if rule, ok := packageRules[f]; ok {
			return rule, true
		}
	}
	return packageRule{}, false
}

func importPath(spec *ast.ImportSpec) string {
	imported, err := strconv.Unquote(spec.Path.Value)
	if err != nil {
		return spec.Path.Value
	}
	return imported
}

func topFolder(folder string) string {
	top, _, _ := strings.Cut(folder, "/")
	return top
}

func within(imported, prefix string) bool {
	return imported == prefix || strings.HasPrefix(imported, strings.TrimSuffix(prefix, "/")+"/")
}
