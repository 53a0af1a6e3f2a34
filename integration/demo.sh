#!/usr/bin/env bash
# `make demo`: builds a small C++ workspace with a real Bazel on a farm on this machine, then once
# more from the farm's cache, and shows what ran where. It needs Go and apt-get, listens on loopback
# only, on ports that are free, and leaves nothing behind but installed packages and bin/jetfarm.
set -euo pipefail
cd "$(dirname "$0")/.."
repository=$PWD

say() { printf '\n%s\n' "$*"; }
step() { printf '\n== %s\n' "$*"; }
fail() {
  printf '\ndemo: %s\n' "$*" >&2
  exit 1
}

scratch=$(mktemp -d "${TMPDIR:-/tmp}/jetfarm-demo.XXXXXX")
workspace=$scratch/workspace
farm=

bazel_in_workspace() {
  (cd "$workspace" && bazel --nohome_rc --output_user_root="$scratch/bazel" "$@" </dev/null)
}

# Stops the Bazel server, also one that an interrupted client has only just started.
stop_bazel() {
  local file pid
  for file in "$scratch"/bazel/*/server/server.pid.txt; do
    [ -s "$file" ] || continue
    pid=$(cat "$file")
    bazel_in_workspace shutdown >/dev/null 2>&1 || true
    for _ in $(seq 50); do
      kill -0 "$pid" 2>/dev/null || break
      kill -TERM "$pid" 2>/dev/null || true
      sleep 0.1
    done
    kill -KILL "$pid" 2>/dev/null || true
  done
}

# Runs on every way out, Ctrl-C included.
stop() {
  local code=$?
  trap - EXIT
  trap '' INT TERM # what was started is stopped, however impatient the user is
  if [ -n "$farm" ] && kill -0 "$farm" 2>/dev/null; then
    kill -TERM "$farm" 2>/dev/null || true
    wait "$farm" 2>/dev/null || true
  fi
  stop_bazel
  if [ "$code" -ne 0 ] && [ -s "$scratch/farm.log" ]; then
    printf '\nThe last lines of the farm'\''s log:\n' >&2
    tail -n 20 "$scratch/farm.log" >&2
  fi
  chmod -R u+w "$scratch" 2>/dev/null || true
  rm -rf "$scratch"
  exit "$code"
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Starts the farm in the background and waits for the line with which it says that it serves.
start_farm() {
  # In a session of its own a Ctrl-C does not reach it: it is stopped after Bazel, and cleanly.
  setsid ./bin/jetfarm up --data "$scratch/data" --grpc 127.0.0.1:0 --http 127.0.0.1:0 \
    >"$scratch/farm.ready" 2>"$scratch/farm.log" &
  farm=$!
  local tries
  for tries in $(seq 300); do
    if grep -q '^ready ' "$scratch/farm.ready"; then
      return
    fi
    kill -0 "$farm" 2>/dev/null || fail "the farm ended before it was ready"
    sleep 0.1
  done
  fail "the farm was not ready after $((tries / 10)) s"
}

# field NAME prints a field of the ready line.
field() { sed -nE "s/^ready .*\b$1=([^ ]+).*/\1/p" "$scratch/farm.ready"; }

write_bazelrc() {
  local stubs=$repository/integration/testdata/bazel-offline rules=/usr/share/bazel
  cat >"$workspace/.bazelrc" <<RC
startup --host_jvm_args=-Xmx1500m --host_jvm_args=-Djava.io.tmpdir=$scratch --max_idle_secs=60
# Where Debian has the rules that Bazel would otherwise download.
common --override_repository=rules_cc=$stubs/rules_cc
common --override_repository=rules_java=$rules/rules/java
common --override_repository=rules_proto=$rules/rules/proto
common --override_repository=platforms=$rules/tools/platforms
common --override_repository=bazel_skylib=$rules/tools/skylib
common --override_repository=remote_coverage_tools=$stubs/remote_coverage_tools
common --override_repository=remote_java_tools_linux=$stubs/remote_java_tools_linux
build --javabase=@local_jdk//:jdk --host_javabase=@local_jdk//:jdk
build --incompatible_strict_action_env --nosandbox_debug
common --color=no --curses=no --noshow_progress
test --notest_verbose_timeout_warnings
# The farm. Without a local fallback, what the farm does not do is not done.
build --remote_executor=grpc://$(field grpc) --spawn_strategy=remote --noremote_local_fallback
RC
}

# build NAME builds and tests everything and keeps Bazel's own list of what was executed.
build() {
  if ! bazel_in_workspace test //... --execution_log_json_file="$scratch/$1.json" >"$scratch/$1.out" 2>&1; then
    cat "$scratch/$1.out" >&2
    fail "the build failed"
  fi
  sed -n '/Invocation ID/!s/^/  bazel | /p' "$scratch/$1.out"
}

# what_ran NAME prints one line for each action: where its result came from and what it was.
what_ran() {
  awk -F '"' '
    /^  "progressMessage":/ { what = $4 }
    /^  "runner":/ { runner = $4 }
    /^  "remoteCacheHit":/ { cached = ($0 ~ /true/) }
    /^}/ {
      where = "elsewhere: " runner
      if (cached) where = "from the farm'\''s cache"
      else if (runner == "remote") where = "executed on the farm"
      else if (runner ~ /remote cache hit/) where = "from the farm'\''s cache"
      printf "  %-22s  %s\n", where, what
    }' "$scratch/$1.json"
}

# check NAME WHERE fails unless every action came from there.
check() {
  local total here
  total=$(what_ran "$1" | wc -l)
  here=$(what_ran "$1" | grep -c "^  $2" || true)
  if [ "$total" -eq 0 ] || [ "$here" -ne "$total" ]; then
    fail "$here of $total actions were $2, all should be"
  fi
  say "  $total of $total actions: $2."
}

step "1. What this machine needs"
./.ci/packages

step "2. Build jetfarm"
go build -o bin/jetfarm ./cmd/jetfarm
ls -l bin/jetfarm | awk '{printf "  bin/jetfarm, %d MiB\n", $5 / 1048576}'

step "3. Start a farm: jetfarm up"
start_farm
echo "  broker, frontend and one worker run in process $farm"
echo "  builds go to grpc://$(field grpc), health and metrics are at http://$(field http)/"

step "4. The first build, on an empty farm: bazel test //..."
mkdir "$workspace"
cp integration/testdata/demo/* "$workspace"
write_bazelrc
build first
say "  What ran where:"
what_ran first
check first "executed on the farm"

step "5. bazel clean, and the same build again"
bazel_in_workspace clean >"$scratch/clean.out" 2>&1 || fail "bazel clean: $(cat "$scratch/clean.out")"
build second
say "  What ran where:"
what_ran second
check second "from the farm's cache"

step "6. What was built"
echo "  bazel-bin/report.txt, written by the program that the farm compiled, linked and ran:"
head -n 3 "$workspace/bazel-bin/report.txt" | sed 's/^/    /'
echo "    ..."

step "Done"
cat <<'TEXT'
  The first build was compiled, linked, run and tested by the farm's worker; Bazel only sent the
  sources and took the results. The second build ran nothing: every result came from the cache.

  To use a farm with your own workspace:
    ./bin/jetfarm up            # leave it running
    ./bin/jetfarm bazelrc       # prints the lines for your .bazelrc
TEXT
