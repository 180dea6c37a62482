#!/bin/sh
# A video with curl alone: sh curl.sh http://127.0.0.1:8000
set -eu
url=${1:-http://127.0.0.1:8000}
field() { python3 -c "import json,sys; print(json.load(sys.stdin)['$1'])"; }

# Until the video is made; one that failed ends this script with its error
wait_for() {
  while :; do
    video=$(curl -sf "$url/v1/videos/$1")
    case $(printf %s "$video" | field status) in
      completed) return ;;
      failed) printf %s "$video" | field error >&2; exit 1 ;;
    esac
    sleep 0.5
  done
}

curl -sf "$url/ready"
echo
id=$(curl -sf "$url/v1/videos" -F prompt="a green seven drifts left over a dark blue background, soft light" -F seconds=3 -F seed=7 | field id)
wait_for "$id"
curl -sf "$url/v1/videos/$id/content" -o curl.mp4
curl -sf "$url/v1/videos/$id/content?variant=spritesheet" -o curl.png

# A new take from chunk 1 on, with another prompt; the first chunk is shared
take=$(curl -sf "$url/v1/videos/$id/retake" -H 'content-type: application/json' -d '{"from_chunk": 1, "prompt": "a red two circles over a forest background, light from above", "cut": true}' | field id)
wait_for "$take"
curl -sf "$url/v1/videos/$take/content" -o take.mp4
curl -sf -X DELETE "$url/v1/videos/$id"
echo
