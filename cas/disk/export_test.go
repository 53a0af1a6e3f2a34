package disk

import "os"

// Check compares the index with the files and returns what differs. Nothing may be going on.
func (t *Tier) Check(list func(dir string) []string) (problems []string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	files := make(map[string]bool)
	for i := range shards {
		for _, name := range list(t.dir + "/cas/" + shard(byte(i))) {
			files[shard(byte(i))+"/"+name] = true
		}
	}
	var used int64
	for k, i := range t.index.byKey {
		e := t.index.slots[i].entry
		used += cost(e.size)
		name := fileName(t.index.spaces[k.space], e)
		if !files[name] {
			problems = append(problems, "no file "+name)
		}
		delete(files, name)
	}
	for name := range files {
		problems = append(problems, "unknown file "+name)
	}
	if used != t.index.used {
		problems = append(problems, "the used bytes do not add up")
	}
	if t.reserved != 0 {
		problems = append(problems, "bytes are still reserved")
	}
	if len(t.flights) != 0 {
		problems = append(problems, "flights have not ended")
	}
	for _, name := range list(t.dir + "/tmp") {
		problems = append(problems, "left in tmp: "+name)
	}
	return problems
}

// Callers returns how many callers lead or wait for flights.
func (t *Tier) Callers() (n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, f := range t.flights {
		n += f.callers
	}
	return n
}

// Used returns the bytes that the index accounts for.
func (t *Tier) Used() int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.index.used
}

// BreakFiles makes the file system fail for every fetch that goes on.
func (t *Tier) BreakFiles() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, f := range t.flights {
		f.file.Close()
	}
}

// Remembered is how many reads the tier remembers at least.
const Remembered = remembered

// Smallest is the size above which a read makes files.
const Smallest = smallest

// Unsum makes the index forget the sums of files.
func (t *Tier) Unsum() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i := range t.index.slots {
		e := t.index.slots[i].entry
		if e.size == 0 || !e.summed {
			continue
		}
		old := t.dir + "/cas/" + fileName(t.index.spaces[e.key.space], e)
		e.summed, e.sum = false, 0
		if err := os.Rename(old, t.dir+"/cas/"+fileName(t.index.spaces[e.key.space], e)); err != nil {
			panic(err)
		}
		t.index.slots[i].entry = e
	}
}
