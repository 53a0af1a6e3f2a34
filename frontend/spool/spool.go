package spool

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"
)

// ErrFull reports a pool whose files have all the bytes that it may hold, or a disk without room.
var ErrFull = errors.New("spool is full")

// inMemory is up to which size a file is kept in memory.
const inMemory = 256 << 10

// Pool makes files below a directory and bounds their bytes together.
type Pool struct {
	dir  string
	max  int64
	used atomic.Int64
}

// NewPool returns a pool of at most maxBytes; dir may be empty for the system's directory of temporary
// files.
func NewPool(dir string, maxBytes int64) *Pool { return &Pool{dir: dir, max: maxBytes} }

// Used is the number of bytes that are held.
func (p *Pool) Used() int64 { return p.used.Load() }

// New returns an empty file, which the caller closes.
func (p *Pool) New() *File { return &File{pool: p} }

// File is written first and read then. It is used by one goroutine at a time while it is written.
type File struct {
	pool   *Pool
	memory []byte
	file   *os.File // nil while all is in memory
	size   int64
}

// Write appends bytes. The error wraps ErrFull when there is no room for them.
func (f *File) Write(p []byte) (int, error) {
	n := int64(len(p))
	if f.pool.used.Add(n) > f.pool.max {
		f.pool.used.Add(-n)
		return 0, fmt.Errorf("%w: %d bytes are held at once", ErrFull, f.pool.max)
	}
	f.size += n
	if f.file == nil && f.size <= inMemory {
		f.memory = append(f.memory, p...)
		return len(p), nil
	}
	if f.file == nil {
		if err := f.spill(); err != nil {
			return 0, err
		}
	}
	written, err := f.file.Write(p)
	return written, failure(err)
}

// spill moves what is in memory into a file.
func (f *File) spill() error {
	file, err := os.CreateTemp(f.pool.dir, "jetfarm-spool-")
	if err != nil {
		return failure(err)
	}
	f.file = file
	if err := os.Remove(file.Name()); err != nil {
		return failure(err)
	}
	_, err = file.Write(f.memory)
	f.memory = nil
	return failure(err)
}

// failure is an error of the file system: whatever it is, there is no room here.
func failure(err error) error {
	if err != nil {
		err = fmt.Errorf("%w: %w", ErrFull, err)
	}
	return err
}

// Size is the number of bytes written.
func (f *File) Size() int64 { return f.size }

// ReadAt implements io.ReaderAt.
func (f *File) ReadAt(p []byte, offset int64) (int, error) {
	if f.file != nil {
		return f.file.ReadAt(p, offset)
	}
	return bytes.NewReader(f.memory).ReadAt(p, offset)
}

// Reader returns a reader of the whole file.
func (f *File) Reader() *io.SectionReader { return io.NewSectionReader(f, 0, f.size) }

// Close frees the file. Closing twice is harmless.
func (f *File) Close() error {
	f.pool.used.Add(-f.size)
	f.size, f.memory = 0, nil
	if f.file == nil {
		return nil
	}
	file := f.file
	f.file = nil
	return file.Close()
}
