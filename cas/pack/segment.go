package pack

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// segment is one file of records. What is not constant is guarded by Pack.mu.
type segment struct {
	number uint64
	file   *os.File

	size    int64 // of the records, those that are being written included
	records int64
	full    bool // nothing more is written to it
	table   bool // there is a file with its table, and it is full
	dropped bool
}

// bytes is what the segment's files take on the disk once there is a table.
func (s *segment) bytes() int64 { return s.size + tableSize(s.records) }

// cost is how much of what the pack may have the segment takes, which is more than its bytes when its
// blobs are tiny.
func (s *segment) cost() int64 { return max(s.size, s.records*perBlob) + tableSize(s.records) }

func (p *Pack) path(number uint64, kind string) string {
	return filepath.Join(p.cfg.Dir, strconv.FormatUint(number, 10)+kind)
}

const (
	recordsKind = ".pack"
	tableKind   = ".table"
	tempKind    = ".temp"
)

// parseName is the inverse of path.
func parseName(name string) (number uint64, kind string, ok bool) {
	base, ext, found := strings.Cut(name, ".")
	number, err := strconv.ParseUint(base, 10, 64)
	ext = "." + ext
	known := ext == recordsKind || ext == tableKind || ext == tempKind
	return number, ext, found && err == nil && number > 0 && known && strconv.FormatUint(number, 10) == base
}

// create makes the file of a new segment.
func (p *Pack) create(number uint64) (*segment, error) {
	f, err := os.OpenFile(p.path(number, recordsKind), os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	return &segment{number: number, file: f}, nil
}

// delete removes the files of a segment that is in no list any more. A read that goes on fails or ends.
func (p *Pack) delete(s *segment) error {
	p.table.removeAll(s.number)
	return errors.Join(s.file.Close(), removeFile(p.path(s.number, tableKind)), removeFile(p.path(s.number, recordsKind)))
}

func removeFile(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("pack: %w", err)
	}
	return nil
}
