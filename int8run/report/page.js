"use strict";
const root = document.documentElement;
root.classList.add("scripted");
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const one = (selector) => document.querySelector(selector);

// -- light and dark: the system's choice until the button is pressed; a frame without storage forgets it
const theme = one("#theme");
const remembered = (value) => {
  try {
    if (value === undefined) return localStorage.getItem("int8run-theme");
    localStorage.setItem("int8run-theme", value);
  } catch {
    return null;
  }
};
const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
const nameTheme = () => { theme.textContent = isDark() ? "Light" : "Dark"; };
if (["light", "dark"].includes(remembered())) root.dataset.theme = remembered();
theme.hidden = false;
theme.addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  remembered(root.dataset.theme);
  nameTheme();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", nameTheme);
nameTheme();

// -- tables that sort; what is missing stays last
const compare = (a, b) => {
  const [x, y] = [Number(a), Number(b)];
  return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, undefined, { numeric: true }) : x - y;
};
const valueOf = (row, column) => (row.cells[column]?.dataset.value ?? "").replace(/^(-?)inf$/, "$1Infinity");
all("table.sortable").forEach((table) => {
  const heads = all("thead th", table);
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const down = head.ariaSort === "ascending";
    heads.forEach((other) => { other.ariaSort = "none"; });
    head.ariaSort = down ? "descending" : "ascending";
    const rows = all("tbody tr:not(.why)", table);
    rows.sort((a, b) => {
      const [x, y] = [valueOf(a, column), valueOf(b, column)];
      if (x === "" || y === "") return (x === "") - (y === "");
      return (down ? -1 : 1) * compare(x, y);
    });
    rows.forEach((row) => {
      const why = row.nextElementSibling?.classList.contains("why") ? row.nextElementSibling : null;
      row.parentElement.append(row, ...(why ? [why] : []));
    });
  }));
});

// -- the wall
const wall = one("#wall");
if (wall) {
  const pictures = JSON.parse(one("#later-pictures").textContent);
  all("img[data-holds]", wall).forEach((img) => { pictures[img.dataset.holds] = img.src; });
  const cut = one("#cut"), side = one("#side"), large = one("#large"), largeShot = one("#large-shot");
  const shots = all(".shot", wall);
  let mode = "ours", ticking = null, open = -1;

  // a mode is what lies below and what lies above it
  const layersOf = { ours: ["ours"], base: ["base"], slider: ["base", "ours"], flicker: ["base", "ours"], difference: ["difference"] };
  const put = (shot, place, id) => {
    let img = shot.querySelector(`.${place}`);
    if (!id) { img?.remove(); return; }
    if (!img) {
      img = document.createElement("img");
      img.className = place;
      img.alt = "";
      img.draggable = false;
      shot.append(img);
    }
    // small pictures are enlarged without smoothing: one sees what was drawn
    img.onload = () => img.classList.toggle("pixels", img.naturalWidth < img.clientWidth && img.naturalWidth <= 256);
    if (img.src !== pictures[id]) img.src = pictures[id];
    else if (img.complete) img.onload();
  };
  const draw = (shot) => {
    const wanted = layersOf[mode].map((name) => shot.dataset[name]);
    const absent = wanted.some((id) => !id);
    shot.classList.toggle("absent", absent);
    put(shot, "under", absent ? shot.dataset.ours : wanted[0]);
    put(shot, "over", absent ? undefined : wanted[1]);
  };
  const show = () => {
    [wall, large].forEach((part) => { part.dataset.mode = mode; part.classList.remove("second"); });
    if (cut) one("#cut-label").hidden = mode !== "slider";
    shots.forEach(draw);
    if (open >= 0) enlarge(open);
    clearInterval(ticking);
    // 1.7 changes a second: fast enough to see a difference move, slow enough to be safe
    if (mode === "flicker") ticking = setInterval(() => [wall, large].forEach((part) => part.classList.toggle("second")), 600);
  };
  all("input[name=mode]").forEach((input) => {
    if (input.checked) mode = input.value; // browsers keep the choice over a reload
    input.addEventListener("change", () => { mode = input.value; show(); });
  });
  const setCut = (percent) => {
    cut.value = percent;
    root.style.setProperty("--cut", `${cut.value}%`);
  };
  cut?.addEventListener("input", () => setCut(cut.value));
  if (cut) setCut(cut.value);
  if (matchMedia("(max-width: 640px)").matches) side.value = 132;
  const setSide = () => {
    root.style.setProperty("--side", `${side.value}px`);
    all("img", wall).forEach((img) => img.onload?.());
  };
  side.addEventListener("input", setSide);
  setSide();

  // a drag over any picture moves all dividers; a press without a move enlarges
  let moved = false;
  const drag = (event) => {
    const shot = event.target.closest?.(".shot");
    if (mode !== "slider" || !shot || event.buttons === 0) return;
    if (event.type === "pointerdown") { moved = false; shot.setPointerCapture(event.pointerId); shot.dataset.from = event.clientX; return; }
    if (!moved && Math.abs(event.clientX - shot.dataset.from) < 4) return;
    moved = true;
    const box = shot.getBoundingClientRect();
    setCut((100 * (event.clientX - box.left)) / box.width);
  };
  ["pointerdown", "pointermove"].forEach((type) => [wall, large].forEach((part) => part.addEventListener(type, drag)));
  wall.addEventListener("dragstart", (event) => event.preventDefault());

  const enlarge = (place) => {
    open = place;
    const shot = shots[place], img = shot.querySelector("img");
    ["ours", "base", "difference"].forEach((name) => {
      if (shot.dataset[name]) largeShot.dataset[name] = shot.dataset[name];
      else delete largeShot.dataset[name];
    });
    one("#large-words").textContent = `${shot.dataset.run} · ${shot.dataset.caption} · ${shot.parentElement.querySelector(".under-words").textContent.trim().replace(/^#\d+\s*/, "")}`;
    const [w, h] = [img.naturalWidth || 64, img.naturalHeight || 64];
    const room = Math.min((innerWidth - 48) / w, (innerHeight - 190) / h);
    const factor = room >= 1 ? (w <= 256 ? Math.floor(room) : Math.min(room, 2)) : room;
    largeShot.style.width = `${Math.round(w * factor)}px`;
    if (!large.open) large.showModal();
    draw(largeShot);
  };
  shots.forEach((shot, place) => shot.addEventListener("click", (event) => {
    if (moved && event.detail > 0) { moved = false; return; }
    enlarge(place);
  }));
  large.addEventListener("close", () => { shots[open]?.focus(); open = -1; });
  large.addEventListener("click", (event) => { if (event.target === large) large.close(); });
  const neighbour = (dx, dy) => {
    const cell = shots[open].closest("td");
    const rows = all("tr.shots", wall);
    let row = rows.indexOf(cell.parentElement), column = cell.cellIndex;
    do { row += dy; column += dx; } while (rows[row]?.cells[column] && !rows[row].cells[column].querySelector(".shot"));
    const shot = rows[row]?.cells[column]?.querySelector(".shot");
    if (shot) enlarge(shots.indexOf(shot));
  };
  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  large.addEventListener("keydown", (event) => {
    if (!steps[event.key]) return;
    event.preventDefault();
    neighbour(...steps[event.key]);
  });
  all("[data-step]", large).forEach((button) => button.addEventListener("click", () => neighbour(Number(button.dataset.step), 0)));
  show();
}

// -- the heat-map
const heat = one("#heat");
if (heat) {
  const body = heat.tBodies[0], rows = [...body.rows];
  const worst = one("#worst"), hide = one("#hide-float"), filter = one("#filter"), said = one("#shown-layers");
  const worstOf = (row) => (row.dataset.worst === "inf" ? Infinity : Number(row.dataset.worst));
  const show = () => {
    const order = worst.checked ? rows.toSorted((a, b) => (worstOf(a) < worstOf(b) ? -1 : worstOf(a) > worstOf(b) ? 1 : 0)) : rows;
    const word = filter.value.trim().toLowerCase();
    rows.forEach((row) => {
      row.hidden = !row.cells[0].textContent.toLowerCase().includes(word) || (hide.checked && row.classList.contains("all-float"));
    });
    body.append(...order);
    const shown = rows.filter((row) => !row.hidden).length;
    said.textContent = shown < rows.length ? `${shown} of ${rows.length} layers` : `${rows.length} layers`;
  };
  [worst, hide, filter].forEach((input) => input.addEventListener("input", show));
  show();
}

// -- commands
all(".copy").forEach((button) => {
  if (!navigator.clipboard) { button.remove(); return; }
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(button.previousElementSibling.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(button.previousElementSibling);
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
});
