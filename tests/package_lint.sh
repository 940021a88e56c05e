#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
#
# tests/package_lint.sh   (where build/deb was made)
#
# lintian on what `make deb` has made: no error and no warning, but for those in debian/*.lintian-overrides.
set -euo pipefail

cd -- "${BASH_SOURCE[0]%/*}/../build/deb"
mapfile -t changes < <(find . -name '*.changes')
((${#changes[@]} == 1)) || {
    printf 'lint: there is not one .changes in build/deb: run make deb\n' >&2
    exit 1
}
# It says so when it is run by root, which it is here.
lintian --allow-root --fail-on error,warning --tag-display-limit 0 "${changes[0]}"
printf 'lint: %s is clean\n' "${changes[0]##*/}"
