#!/usr/bin/env bash
# Puts built documents into the folder of their version on the branch gh-pages, beside those of other versions, and
# leads the front page to the newest tag. Usage: .ci/publish-documents.sh HTML VERSION REMOTE
set -euo pipefail
html=$(realpath "$1") version=$2 remote=$3
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if ! git clone --quiet --depth 1 --branch gh-pages "$remote" "$site" 2> /dev/null; then
	git init --quiet --initial-branch gh-pages "$site"
	git -C "$site" remote add origin "$remote"
fi
cd "$site"
rm -rf "./$version"
cp -r "$html" "./$version"
touch .nojekyll
newest=$(find . -maxdepth 1 -type d -name 'v[0-9]*' -printf '%f\n' | sort --version-sort | tail -1)
newest=${newest:-$version}
find . -maxdepth 1 -mindepth 1 -type d ! -name .git -printf '%f\n' | sort --version-sort --reverse > versions.txt
cat > index.html <<- PAGE
	<!doctype html>
	<title>moetuner</title>
	<meta http-equiv="refresh" content="0; url=$newest/">
	<a href="$newest/">moetuner $newest</a>
	$(sed 's|.*|<li><a href="&/">&</a></li>|' versions.txt)
PAGE
git add --all
git -c user.name=documents -c user.email=documents@users.noreply.github.com commit --quiet -m "Documents of $version"
git push --quiet origin gh-pages
