package conformance

import (
	"bytes"
	"fmt"
	"io/fs"
	"slices"
	"strings"
)

// families are the chapters of the table.
var families = []struct{ name, title string }{ //nolint:gochecknoglobals // a table that nothing changes
	{"GEN", "Every call"},
	{"CAP", "GetCapabilities"},
	{"FMB", "FindMissingBlobs"},
	{"BUB", "BatchUpdateBlobs"},
	{"BRB", "BatchReadBlobs"},
	{"TREE", "GetTree"},
	{"RD", "ByteStream Read"},
	{"WR", "ByteStream Write"},
	{"QWS", "QueryWriteStatus"},
	{"ZST", "Compression"},
	{"CHK", "Chunk mappings"},
	{"ACG", "GetActionResult"},
	{"ACU", "UpdateActionResult"},
	{"AST", "Remote Asset"},
	{"EXA", "Execute"},
	{"EXV", "What is refused to be executed"},
	{"EXR", "Running"},
	{"OPS", "Streams of operations"},
	{"WAIT", "WaitExecution"},
	{"LRO", "Operations"},
	{"X", "Abuse"},
}

const preface = `# Conformance

<!-- Made by make conformance from the names of the tests and integration/conformance/rows.txt. -->

Which rules of the Remote Execution API this farm keeps, and which abuses of it are tried, by the
tests that show it. A row is "tested" when a test is named after it; what the test
proves is in the test. Level: MUST, SHOULD and MAY are those of the specification, DEC is a decision
of this project where the specification leaves room, CLI is what a known client needs.

Where the farm does something else than the words of the specification:

* QueryWriteStatus of an upload that nobody knows is {0, false} in place of NOT_FOUND, which clients take
  as the end of the upload.
* A Write that begins before what is kept of the upload is ABORTED with RetryInfo: more arrived after the
  client asked, and it should ask again. Beyond what is kept it is INVALID_ARGUMENT, and 0 starts over.
* A Write that is closed without finish_write is OK and tells in committed_size what is kept.
* Of compressed uploads and of blobs up to 512 KiB nothing is kept; they start over.
* committed_size of a compressed upload is the number of compressed bytes, or -1 when the blob was there.
* Missing inputs of an Execute come in the response of a finished operation, not as the status of the call.
  When the action, its command or the input root is absent, what is below it is listed by the next Execute.
* CancelOperation ends an operation for everybody whose equal action shares it.

`

// Table is docs/CONFORMANCE.md for the module at root.
func Table(root fs.FS) ([]byte, error) {
	rows, err := Rows()
	if err != nil {
		return nil, err
	}
	claims, err := FindClaims(root, rows)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	out.WriteString(preface)
	summary(&out, rows, claims)
	for _, family := range families {
		fmt.Fprintf(&out, "\n## %s: %s\n\n| row | level | rule | status | test |\n| --- | --- | --- | --- | --- |\n", family.name, family.title)
		for _, row := range rows {
			if row.Family() == family.name {
				fmt.Fprintf(&out, "| %s | %s | %s | %s | %s |\n", row.ID, row.Level, row.Rule, status(row, claims), links(claims[row.ID]))
			}
		}
	}
	if i := slices.IndexFunc(rows, func(r Row) bool { return !strings.Contains(out.String(), "| "+r.ID+" |") }); i >= 0 {
		return nil, fmt.Errorf("row %s is of no family", rows[i].ID)
	}
	return out.Bytes(), nil
}

func summary(out *bytes.Buffer, rows []Row, claims Claims) {
	out.WriteString("| family | rows | tested | not claimed, with a reason | no test yet |\n| --- | --- | --- | --- | --- |\n")
	for _, family := range families {
		var all, tested, reason int
		for _, row := range rows {
			if row.Family() != family.name {
				continue
			}
			all++
			switch {
			case len(claims[row.ID]) > 0:
				tested++
			case row.Unclaimed != "":
				reason++
			}
		}
		fmt.Fprintf(out, "| %s | %d | %d | %d | %d |\n", family.name, all, tested, reason, all-tested-reason)
	}
}

func status(row Row, claims Claims) string {
	switch {
	case len(claims[row.ID]) > 0:
		return "tested"
	case row.Unclaimed != "":
		return row.Unclaimed
	}
	return "no test yet"
}

func links(tests []Test) string {
	var out []string
	for _, t := range tests {
		out = append(out, fmt.Sprintf("[%s](../%s)", t.Name, t.File))
	}
	return strings.Join(out, ", ")
}
