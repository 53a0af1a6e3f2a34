#!/bin/sh
# Passes when its runfiles and its scratch directory are there.
set -eu
grep -q 'data of a test' tests/data.txt
echo scratch > "$TEST_TMPDIR/scratch"
