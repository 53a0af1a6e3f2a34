#!/bin/sh
# Fails and says so on both streams.
echo standard output of the failing test
echo standard error of the failing test >&2
exit 7
