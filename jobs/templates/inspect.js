// The page of a text: the pointer's byte is told at once, and the slider cuts the text again.
(() => {
  const passage = document.querySelector(".passage");
  const cells = [...passage.querySelectorAll("i")];
  const indexOf = new Map(cells.map((cell, i) => [cell, i]));
  const readout = document.getElementById("readout");
  const controls = document.getElementById("controls");
  let lengths = null;
  let pointed = null;

  // The title as it was written, with the length that the patch has now.
  function describe(i) {
    const length = lengths && `${lengths[i]} byte${lengths[i] > 1 ? "s" : ""}`;
    return length ? cells[i].title.replace(/patch of \d+ bytes?$/, `patch of ${length}`) : cells[i].title;
  }

  function tell(i) {
    cells[i].title = describe(i);
    readout.textContent = cells[i].title;
    pointed = i;
  }

  passage.addEventListener("pointerover", (event) => {
    const i = indexOf.get(event.target);
    if (i !== undefined) {
      tell(i);
    }
  });
  readout.hidden = false;
  if (!controls) {
    return;
  }

  const nats = float32s(controls.dataset.nats);
  const own = Number(controls.dataset.threshold);
  const top = Number(controls.dataset.top);
  const slider = document.getElementById("slider");
  const number = document.getElementById("number");
  const kinds = cells.map((cell) => (/ (?:hex|symbol)$/.exec(cell.className) || [""])[0]);
  const words = [];
  let first = 0;
  for (const word of passage.querySelectorAll(".word")) {
    const count = word.querySelectorAll("i").length;
    // The curve of a word leads over from the byte before, where there is one.
    const points = word.querySelector("polyline").getAttribute("points").split(" ").slice(first > 0 ? 1 : 0);
    words.push({ first, points: points.slice(0, count), path: word.querySelector("path") });
    first += count;
  }

  function colour(starts) {
    let patch = 0;
    for (let i = 0; i < cells.length; i += 1) {
      patch += starts[i];
      const closes = i + 1 === cells.length || starts[i + 1];
      const name = `c${patch % 4}${starts[i] ? " opens" : ""}${closes ? " closes" : ""}${kinds[i]}`;
      if (cells[i].className !== name) {
        cells[i].className = name;
      }
    }
    return patch;
  }

  function mark(threshold) {
    const limit = Math.fround(threshold);
    for (const word of words) {
      const above = word.points.filter((_, k) => nats[word.first + k] > limit);
      word.path.setAttribute("d", above.map((point) => `M${point}h0`).join(""));
    }
    const shown = threshold >= 0 && threshold <= top;
    passage.style.setProperty("--threshold", shown ? `${100 * (1 - threshold / top)}%` : "-9px");
  }

  function cut(threshold) {
    const starts = patchStarts(nats, threshold, Number(controls.dataset.maxPatchLength));
    lengths = patchLengths(starts);
    const patches = colour(starts);
    mark(threshold);
    const longest = lengths.reduce((most, length) => Math.max(most, length), 0);
    document.getElementById("patches").textContent = patches.toLocaleString("en-US");
    document.getElementById("mean").textContent = (nats.length / patches).toFixed(3);
    document.getElementById("longest").textContent = longest.toLocaleString("en-US");
    if (pointed !== null) {
      tell(pointed);
    }
  }

  let wanted = null;
  function show(threshold) {
    if (wanted === null) {
      requestAnimationFrame(() => {
        cut(wanted);
        wanted = null;
      });
    }
    wanted = threshold;
  }

  // The field keeps every digit; the slider stands at the nearest of its steps.
  function set(threshold) {
    number.value = String(threshold);
    slider.value = String(threshold);
    show(threshold);
  }

  function asked() {
    const found = /^#threshold=(-?[0-9.]+)$/.exec(location.hash);
    return found && Number.isFinite(Number(found[1])) ? Number(found[1]) : own;
  }

  slider.addEventListener("input", () => {
    number.value = slider.value;
    show(Number(slider.value));
  });
  number.addEventListener("input", () => {
    if (number.value !== "" && Number.isFinite(number.valueAsNumber)) {
      slider.value = number.value;
      show(number.valueAsNumber);
    }
  });
  document.getElementById("own").addEventListener("click", () => set(own));
  window.addEventListener("hashchange", () => set(asked()));
  controls.hidden = false;
  set(asked());
})();
