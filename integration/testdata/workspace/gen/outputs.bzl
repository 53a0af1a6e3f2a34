"""Rules whose outputs are not plain files."""

def _directory(ctx):
    out = ctx.actions.declare_directory(ctx.label.name + ".d")
    ctx.actions.run_shell(
        outputs = [out],
        mnemonic = "MakeDirectory",
        command = """
set -eu
mkdir -p "$1/deep/er" "$1/empty"
i=0
while [ $i -lt "$2" ]; do
  echo "file $i" > "$1/deep/er/file$i.txt"
  i=$((i + 1))
done
printf '#!/bin/sh\n' > "$1/run.sh"
chmod +x "$1/run.sh"
ln -s deep/er/file0.txt "$1/link.txt"
""",
        arguments = [out.path, str(ctx.attr.files)],
    )
    return [DefaultInfo(files = depset([out]))]

directory = rule(
    implementation = _directory,
    attrs = {"files": attr.int()},
)

def _symlinked(ctx):
    out = ctx.actions.declare_file(ctx.label.name + ".txt")
    ctx.actions.symlink(output = out, target_file = ctx.file.src)
    return [DefaultInfo(files = depset([out]))]

symlinked = rule(
    implementation = _symlinked,
    attrs = {"src": attr.label(allow_single_file = True)},
)
