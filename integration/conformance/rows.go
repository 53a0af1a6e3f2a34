package conformance

import (
	_ "embed"
	"fmt"
	"regexp"
	"strings"
)

//go:embed rows.txt
var rowsText string

// A Row is one rule or abuse.
type Row struct {
	ID, Level, Rule string
	// Unclaimed is why no test claims the row, if there is a reason.
	Unclaimed string
}

// Family is the part of the ID before the number.
func (r Row) Family() string {
	family, _, _ := strings.Cut(r.ID, "-")
	return family
}

var rowID = regexp.MustCompile(`^[A-Z]{1,4}-[0-9]+$`)

// Rows parses rows.txt.
func Rows() ([]Row, error) {
	var rows []Row
	seen := make(map[string]bool)
	for line := range strings.Lines(rowsText) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		fields := strings.Split(line, " | ")
		if len(fields) < 3 || len(fields) > 4 || !rowID.MatchString(fields[0]) || seen[fields[0]] {
			return nil, fmt.Errorf("rows.txt: %q is not ID | level | rule, or its ID is there twice", line)
		}
		seen[fields[0]] = true
		row := Row{ID: fields[0], Level: fields[1], Rule: fields[2]}
		if len(fields) == 4 {
			row.Unclaimed = fields[3]
		}
		rows = append(rows, row)
	}
	return rows, nil
}
