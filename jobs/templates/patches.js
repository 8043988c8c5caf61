"use strict";

// Patches by a plain threshold, as blt.patching cuts them. In: for each byte the nats (float32) of the distribution that
// it was drawn from. Out: 1 for each byte that starts a patch. The first byte starts one, and so does a byte whose nats
// are above the threshold; what is longer than maxPatchLength (0 sets no limit) is cut into pieces of that length.
function patchStarts(nats, threshold, maxPatchLength) {
  const starts = new Uint8Array(nats.length);
  const limit = Math.fround(threshold);
  let latest = 0;
  for (let i = 0; i < nats.length; i += 1) {
    if (i === 0 || nats[i] > limit) {
      latest = i;
    }
    starts[i] = latest === i || (maxPatchLength > 0 && (i - latest) % maxPatchLength === 0) ? 1 : 0;
  }
  return starts;
}

// For each byte the length of its patch.
function patchLengths(starts) {
  const lengths = new Uint32Array(starts.length);
  for (let first = 0; first < starts.length; ) {
    let next = first + 1;
    while (next < starts.length && !starts[next]) {
      next += 1;
    }
    lengths.fill(next - first, first, next);
    first = next;
  }
  return lengths;
}

// Numbers of base64 that holds them as float32, lowest byte first.
function float32s(base64) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Float32Array.from({ length: bytes.length / 4 }, (_, i) => view.getFloat32(4 * i, true));
}
