#!/bin/sh
# sh samples/clients/curl.sh http://localhost:8080 page.jpg "pension seminar"
set -eu
url=$1 page=$2 query=$3
curl -sSf --data-binary "@$page" "$url/embed" -o page.f32            # rows of float32; how many, and how long: Cembed-Rows, Cembed-Dim
curl -sSf -H 'Content-Type: text/plain' --data "$query" "$url/embed" -o query.f32
curl -sSf --data-binary "@$page" "$url/pages?name=$(basename "$page")"
echo
curl -sSf -G "$url/search" --data-urlencode "q=$query" -d top=3
echo
