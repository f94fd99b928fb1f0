#!/bin/sh
exec /usr/lib/cembed/bin/python3 -I -m cembed "$@"
