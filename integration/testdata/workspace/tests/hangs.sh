#!/bin/sh
# Never ends by itself.
echo output before the hang
exec sleep 600.0411
