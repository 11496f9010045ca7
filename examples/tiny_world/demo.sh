#!/bin/sh
# Exports the committed checkpoint and asks four questions about the committed video.
set -eu
here=$(dirname "$0")
out=${1:-build}
mkdir -p "$out"

ppllava-export "$here/checkpoint" "$out/tiny_world" --fp16 --overwrite

ask() {
    printf '\n> %s\n' "$1"
    ppllava-chat "$out/tiny_world" "$here/sample.mp4" "$@"
}
ask "Which way does the red circle move?" --heatmap "$out/red_circle.png"
ask "What colour is the square?" --heatmap "$out/square.png"
ask "Which leaves first, the purple square or the red circle?"
ask "Describe the video."
printf '\nheatmaps: %s %s\n' "$out/red_circle.png" "$out/square.png"
