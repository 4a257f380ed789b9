#!/usr/bin/env bash
# lock.sh UV: writes requirements/{run,dev,slow,smollm2}.txt with the newest versions that pyproject.toml allows.
#
# One lock serves Python 3.11 to 3.13: it has the hashes of all files of a version. The index must serve the CPU build of
# torch: name one that does in UV_INDEX or UV_FIND_LINKS, or set UV_TORCH_BACKEND=cpu.
set -euo pipefail
cd "$(dirname "$0")/.."
uv=${1:?usage: lock.sh UV}
export UV_FIND_LINKS=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}

lock() {  # lock NAME [EXTRA ...]: torch stands in torch.txt; setuptools builds the project
    local file=requirements/$1.txt
    shift
    printf 'setuptools>=77\n' | "$uv" pip compile pyproject.toml - "${@/#/--extra=}" -c requirements/lock.in --upgrade \
        --universal --python-version 3.11 --generate-hashes --no-emit-package torch --no-header --no-annotate --quiet \
        > "$file.new"
    # The lock is resolved for Linux on x86-64; with the marker, pip would skip every line on another machine.
    {
        echo "# Written by \`make lock\`. Tested with Python 3.11; 3.12 and 3.13 are resolved, not tested."
        sed -e "s/ ; platform_machine == 'x86_64' and sys_platform == 'linux'//" \
            -e "s/ and platform_machine == 'x86_64' and sys_platform == 'linux'//" "$file.new"
    } > "$file"
    rm "$file.new"
}

lock run
lock smollm2 smollm2
lock dev dev
lock slow dev peers smollm2
