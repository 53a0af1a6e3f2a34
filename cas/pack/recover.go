package pack

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/jetfarm/jetfarm/cas/keymap"
)

// Open takes over the directory and finds what it holds, about two million blobs in a second, and what
// was written since the last segment was full at the speed of the disk. ctx bounds that.
func Open(ctx context.Context, cfg Config) (*Pack, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("pack: %w", err)
	}
	p := &Pack{cfg: cfg, segment: segmentSize(cfg.MaxBytes), wake: make(chan struct{}, 1)}
	if p.lock, err = lockDir(cfg.Dir); err != nil {
		return nil, fmt.Errorf("pack: %w", err)
	}
	err = p.load(ctx)
	if err == nil {
		p.metrics, err = newMetrics(cfg.Registerer, p)
	}
	if err != nil {
		for _, s := range p.segments {
			err = errors.Join(err, s.file.Close())
		}
		return nil, fmt.Errorf("pack: %w", errors.Join(err, p.lock.Close()))
	}
	p.tend(ctx)
	return p, nil
}

// lockDir keeps other processes out. The kernel drops the lock when the process dies.
func lockDir(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("%s is in use by another process: %w", dir, err), f.Close())
	}
	return f, nil
}

func (p *Pack) load(ctx context.Context) error {
	names, err := os.ReadDir(p.cfg.Dir)
	if err != nil {
		return err
	}
	var numbers []uint64
	for _, entry := range names {
		number, kind, ok := parseName(entry.Name())
		if !ok {
			continue
		}
		p.last = max(p.last, number)
		switch kind {
		case recordsKind:
			numbers = append(numbers, number)
		case tempKind:
			err = errors.Join(err, os.Remove(p.path(number, tempKind)))
		case tableKind:
			if _, absent := os.Stat(p.path(number, recordsKind)); errors.Is(absent, fs.ErrNotExist) {
				err = errors.Join(err, os.Remove(p.path(number, tableKind)))
			}
		}
	}
	slices.Sort(numbers)
	for _, number := range numbers {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		err = errors.Join(err, p.loadSegment(number))
	}
	return err
}

// loadSegment enters what a segment holds into the table. One that holds nothing is deleted.
func (p *Pack) loadSegment(number uint64) error {
	f, err := os.Open(p.path(number, recordsKind))
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err != nil {
		return errors.Join(err, f.Close())
	}
	s := &segment{number: number, file: f, size: info.Size(), full: true}
	add := func(k keymap.Key, at place) {
		s.records++
		p.table.set(k, at)
	}
	if s.table = p.loadTable(s, add); !s.table {
		p.scan(s, add)
	}
	if s.records == 0 {
		return p.delete(s)
	}
	p.segments = append(p.segments, s)
	return nil
}

// scan reads the records of a segment one by one up to the first thing that is none. A record that is
// damaged and tells where it ends is left out.
func (p *Pack) scan(s *segment, add func(keymap.Key, place)) {
	r := bufio.NewReaderSize(io.NewSectionReader(s.file, 0, s.size), maxWrite)
	var header [headerSize]byte
	data := make([]byte, recordSize(MaxBlob))
	for offset := int64(0); offset < align<<offsetBits; {
		if _, err := io.ReadFull(r, header[:]); err != nil {
			return
		}
		k, size, want, ok := parseHeader(header[:])
		if !ok {
			return
		}
		padded := data[:recordSize(size)-headerSize]
		if _, err := io.ReadFull(r, padded); err != nil {
			return
		}
		sum := update(update(0, header[:headerSize-4]), padded[:size])
		if sum == want {
			add(k, newPlace(s.number, offset, size))
		}
		offset += recordSize(size)
	}
}

// The table of a segment is a header, 24 bytes for each blob (its key and its place), and the CRC-32C of
// all that. All numbers are little-endian:
//
//	0 4  tableMagic
//	4 4  the number of blobs
//	8 8  the number of the segment
const (
	tableMagic  = 0x3154504a // JPT1
	tableHeader = 16
	tableRecord = 24
	sumSize     = 4
)

func tableSize(records int64) int64 { return tableHeader + records*tableRecord + sumSize }

// loadTable enters the blobs of a segment from its table, if that is whole.
func (p *Pack) loadTable(s *segment, add func(keymap.Key, place)) bool {
	data, err := os.ReadFile(p.path(s.number, tableKind))
	if err != nil || len(data) < tableHeader+sumSize {
		return false
	}
	body, sum := data[:len(data)-sumSize], binary.LittleEndian.Uint32(data[len(data)-sumSize:])
	count := int64(binary.LittleEndian.Uint32(body[4:]))
	if binary.LittleEndian.Uint32(body) != tableMagic || binary.LittleEndian.Uint64(body[8:]) != s.number ||
		tableSize(count) != int64(len(data)) || update(0, body) != sum {
		return false
	}
	for record := range slices.Chunk(body[tableHeader:], tableRecord) {
		at := place(binary.LittleEndian.Uint64(record[16:]))
		if at.number() == s.number&numberMask && at.size() > 0 && at.offset()+headerSize+at.size() <= s.size {
			add(keymap.Key(record[:16]), at)
		}
	}
	return true
}

// writeTable writes the table of a segment that is full.
func (p *Pack) writeTable(s *segment) error {
	body := make([]byte, tableHeader, tableSize(s.records))
	count := uint32(0)
	p.table.all(s.number, func(k keymap.Key, at place) {
		body = append(body, k[:]...)
		body = binary.LittleEndian.AppendUint64(body, uint64(at))
		count++
	})
	binary.LittleEndian.PutUint32(body, tableMagic)
	binary.LittleEndian.PutUint32(body[4:], count)
	binary.LittleEndian.PutUint64(body[8:], s.number)
	body = binary.LittleEndian.AppendUint32(body, update(0, body))
	temp := p.path(s.number, tempKind)
	if err := os.WriteFile(temp, body, 0o600); err != nil {
		return errors.Join(err, removeFile(temp))
	}
	return os.Rename(temp, p.path(s.number, tableKind))
}
