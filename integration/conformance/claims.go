package conformance

import (
	"cmp"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// A Test is a test function of the module.
type Test struct{ File, Name string }

// Claims is the tests that claim each row, by the row's ID.
type Claims map[string][]Test

// FindClaims reads every test of the module at root. A claim of a row that is in one of the families and
// is not in rows is an error: it would be a typing error in a test's name.
func FindClaims(root fs.FS, rows []Row) (Claims, error) {
	known, families := make(map[string]bool), make(map[string]bool)
	for _, row := range rows {
		known[row.ID], families[row.Family()] = true, true
	}
	packages, err := testFunctions(root)
	if err != nil {
		return nil, err
	}
	claims := make(Claims)
	for _, found := range packages {
		for _, f := range found {
			for _, id := range f.rows {
				family, _, _ := strings.Cut(id, "-")
				switch {
				case known[id]:
					claims[id] = append(claims[id], testsOf(f, found)...)
				case families[family]:
					return nil, fmt.Errorf("%s: %s names %s, which is not in rows.txt", f.File, f.Name, id)
				}
			}
		}
	}
	for id, tests := range claims {
		slices.SortFunc(tests, func(a, b Test) int {
			return cmp.Or(cmp.Compare(a.File, b.File), cmp.Compare(a.Name, b.Name))
		})
		claims[id] = slices.Compact(tests)
	}
	return claims, nil
}

// testFunctions returns the functions of all test files by their folders.
func testFunctions(root fs.FS) (map[string][]function, error) {
	packages := make(map[string][]function)
	return packages, fs.WalkDir(root, ".", func(name string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case entry.IsDir() && skipped(name):
			return fs.SkipDir
		case entry.IsDir() || !strings.HasSuffix(name, "_test.go"):
			return nil
		}
		found, err := functions(root, name)
		packages[path.Dir(name)] = append(packages[path.Dir(name)], found...)
		return err
	})
}

// skipped tells folders whose tests claim nothing: a rule of the protocol is proved from outside of the
// server, so those of the store's packages do not count, and those of this package are about claims.
func skipped(folder string) bool {
	base := path.Base(folder)
	return folder == "cas" || folder == "integration/conformance" || base == "testdata" || folder != "." && strings.HasPrefix(base, ".")
}

// function is a function of a test file.
type function struct {
	Test
	rows []string        // that its name and its texts begin with
	uses map[string]bool // the identifiers in its body
}

func functions(root fs.FS, name string) ([]function, error) {
	source, err := fs.ReadFile(root, name)
	if err != nil {
		return nil, err
	}
	file, err := parser.ParseFile(token.NewFileSet(), name, source, parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	var found []function
	for _, declaration := range file.Decls {
		d, ok := declaration.(*ast.FuncDecl)
		if !ok || d.Body == nil {
			continue
		}
		f := function{Test: Test{File: name, Name: d.Name.Name}, rows: rowsOfName(d.Name.Name), uses: make(map[string]bool)}
		ast.Inspect(d.Body, func(node ast.Node) bool {
			switch n := node.(type) {
			case *ast.Ident:
				f.uses[n.Name] = true
			case *ast.BasicLit:
				if text, err := strconv.Unquote(n.Value); n.Kind == token.STRING && err == nil {
					f.rows = append(f.rows, rowsOfText(text)...)
				}
			}
			return true
		})
		found = append(found, f)
	}
	return found, nil
}

var (
	inName = regexp.MustCompile(`^([A-Z]{1,4})_([0-9]+)(?:_|$)`)
	inText = regexp.MustCompile(`^([A-Z]{1,4}-[0-9]+)(?:[ ,]+|$)`)
)

// rowsOfName returns the rows that the name of a test function begins with, as in TestRD_4_RD_7_Limits.
func rowsOfName(name string) []string {
	rest, ok := strings.CutPrefix(name, "Test")
	var rows []string
	for ok {
		m := inName.FindStringSubmatch(rest)
		if m == nil {
			break
		}
		rows = append(rows, m[1]+"-"+m[2])
		rest = rest[len(m[0]):]
	}
	return rows
}

// rowsOfText returns the rows that a text begins with, as in "RD-4 RD-7 at the end".
func rowsOfText(text string) []string {
	var rows []string
	for {
		m := inText.FindStringSubmatch(text)
		if m == nil {
			return rows
		}
		rows = append(rows, m[1])
		text = text[len(m[0]):]
	}
}

// testsOf returns the test functions that run f: f itself, or those of its package that use it.
func testsOf(f function, all []function) []Test {
	var tests []Test
	seen := map[string]bool{f.Name: true}
	for next := []function{f}; len(next) > 0; {
		g := next[0]
		next = next[1:]
		if strings.HasPrefix(g.Name, "Test") {
			tests = append(tests, g.Test)
			continue
		}
		for _, user := range all {
			if user.uses[g.Name] && !seen[user.Name] {
				seen[user.Name] = true
				next = append(next, user)
			}
		}
	}
	return tests
}
