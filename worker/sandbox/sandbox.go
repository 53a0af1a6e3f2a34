package sandbox

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
)

// Mode is how a command is held apart. The text is what the flag and the worker's registration say.
type Mode string

// The modes, from the strongest; ModeAuto asks for the strongest that works here.
const (
	ModeAuto       Mode = "auto"
	ModeNamespaces Mode = "namespaces"
	ModeUID        Mode = "uid"
	ModeNone       Mode = "none"
)

// ErrMode reports a mode that is not known or does not work on this machine. The text says why.
var ErrMode = errors.New("isolation mode")

// Config is what Open needs.
type Config struct {
	// Mode is the mode to use; empty means ModeAuto. A mode that does not work is an error of Open
	// unless it is ModeAuto.
	Mode Mode
	// Slots is how many commands run at once, at least 1.
	Slots int
	// Dir holds the execution roots. It exists and belongs to the pool alone.
	Dir string
	// FirstUID begins the range of MaxSlots user IDs that slots take theirs from; 0 means 58000, and
	// 56000 in a container. IDs with an entry in the user database are left out.
	FirstUID int
	// Log is told which mode was chosen and why not a stronger one. Never nil.
	Log *slog.Logger
}

// MaxSlots is how many slots one host can have in all its workers together.
const MaxSlots = 1900

const (
	hostFirstUID      = 58000
	containerFirstUID = 56000
)

// defaultFirstUID is another one in a container than on the host: a worker there does not see who has
// which ID here, and the host's worker would kill what runs in the container under the same one.
// Containers may share their range, since none sees the processes of another.
func defaultFirstUID() int {
	const initialNamespace = "pid:[4026531836]" // PROC_PID_INIT_INO of the kernel
	if name, err := os.Readlink("/proc/self/ns/pid"); err == nil && name != initialNamespace {
		return containerFirstUID
	}
	return hostFirstUID
}

// Pool is a fixed number of slots.
type Pool struct {
	mode       Mode
	mountpoint string
	lockDir    string
	log        *slog.Logger
	first      int
	all        []*Slot
	free       chan *Slot
}

// Open probes the mode, claims the slots, and kills what commands of an earlier worker of this host
// that did not end cleanly left running. The caller must Close the pool.
func Open(cfg Config) (*Pool, error) {
	if cfg.Slots < 1 || cfg.Slots > MaxSlots {
		return nil, fmt.Errorf("%d slots: at least 1 and at most %d are possible", cfg.Slots, MaxSlots)
	}
	keepFiles()
	p := &Pool{first: cfg.FirstUID, log: cfg.Log, free: make(chan *Slot, cfg.Slots)}
	if p.first == 0 {
		p.first = defaultFirstUID()
	}
	dir, err := filepath.Abs(cfg.Dir)
	if err != nil {
		return nil, err
	}
	if err := killBelow(dir); err != nil {
		return nil, err
	}
	if err := p.choose(cfg, dir); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	for len(p.all) < cfg.Slots {
		s, err := p.newSlot()
		if err != nil {
			return nil, errors.Join(err, p.Close())
		}
		p.all = append(p.all, s)
	}
	for _, s := range p.all {
		p.free <- s
	}
	return p, nil
}

// choose settles the mode, with one slot claimed on the way if the mode has users.
func (p *Pool) choose(cfg Config, dir string) error {
	modes := []Mode{cfg.Mode}
	switch cfg.Mode {
	case ModeAuto, "":
		modes = []Mode{ModeNamespaces, ModeUID, ModeNone}
	case ModeNamespaces, ModeUID, ModeNone:
	default:
		return fmt.Errorf("%w %q is not known (auto, namespaces, uid, none)", ErrMode, cfg.Mode)
	}
	var why []error
	for _, m := range modes {
		err := p.try(m, dir)
		if err == nil {
			p.mode = m
			log := cfg.Log.With("isolation", string(m))
			if len(why) > 0 {
				log = log.With("err", errors.Join(why...))
			}
			log.Info("isolation mode chosen") //nolint:sloglint // probing has no context
			return nil
		}
		why = append(why, fmt.Errorf("%w %s does not work here: %w", ErrMode, m, err))
	}
	return errors.Join(why...)
}

// Mode is the mode that the pool's slots have, never ModeAuto.
func (p *Pool) Mode() Mode { return p.mode }

// Protects tells whether a command can't change files of the worker's user, so that inputs may be
// hard links of cached files.
func (p *Pool) Protects() bool { return p.mode != ModeNone }

// Mountpoint is the path of the execution root as commands see it, or "" when it is the path on the
// host.
func (p *Pool) Mountpoint() string {
	if p.mode != ModeNamespaces {
		return ""
	}
	return p.mountpoint
}

// Acquire returns a free slot, waiting for one until ctx ends. The caller must Release it.
func (p *Pool) Acquire(ctx context.Context) (*Slot, error) {
	select {
	case s := <-p.free:
		return s, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// Close gives the slots' users back. No slot may be in use.
func (p *Pool) Close() error {
	var errs []error
	for _, s := range p.all {
		errs = append(errs, s.close())
	}
	p.all = nil
	return errors.Join(errs...)
}

// Slot is the place where one command runs at a time.
type Slot struct {
	pool *Pool
	uid  int
	lock *claim
	// files are what commands see in place of the machine's, in ModeNamespaces.
	files []overlay
	// dirty says that the last run is not known to have left nothing. Only the holder touches it.
	dirty bool
}

// UID is the user and group ID that commands of the slot have, or -1 for the worker's own.
func (s *Slot) UID() int { return s.uid }

// Clean kills what is left when an earlier command of the slot could not be killed. Until it has
// returned, nothing that the slot's user can reach may be prepared for the next.
func (s *Slot) Clean() error {
	if !s.dirty {
		return nil
	}
	if err := s.sweep(nil); err != nil {
		return err
	}
	s.dirty = false
	return nil
}

// Release lets another command have the slot.
func (s *Slot) Release() { s.pool.free <- s }

func (s *Slot) close() error {
	if s.lock == nil {
		return nil
	}
	return s.lock.Close()
}
