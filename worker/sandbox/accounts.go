package sandbox

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// account is a file of the system's user database and the line that a slot's user has in it.
type account struct{ file, line string }

func accounts(uid int) []account {
	name := fmt.Sprintf("jetfarm%d", uid)
	return []account{
		{file: "/etc/passwd", line: fmt.Sprintf("%s:x:%d:%d:jetfarm action:/tmp:/bin/sh\n", name, uid, uid)},
		{file: "/etc/group", line: fmt.Sprintf("%s:x:%d:\n", name, uid)},
	}
}

// overlay is a file on the host that commands of a slot see in place of another.
type overlay struct{ source, target string }

// writeAccounts makes copies of the machine's user database in which the slot's user has a name and a
// home: tools that look themselves up, such as Java, Python's getpass and git, fail without.
func writeAccounts(dir string, uid int) ([]overlay, error) {
	var overlays []overlay
	for _, a := range accounts(uid) {
		data, err := os.ReadFile(a.file)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if len(data) > 0 && !bytes.HasSuffix(data, []byte("\n")) {
			data = append(data, '\n')
		}
		source := filepath.Join(dir, fmt.Sprintf("%s-%d", filepath.Base(a.file), uid))
		if err := os.WriteFile(source, append(data, a.line...), 0o644); err != nil { //nolint:gosec // everybody reads the user database
			return nil, err
		}
		overlays = append(overlays, overlay{source: source, target: a.file})
	}
	return overlays, nil
}
