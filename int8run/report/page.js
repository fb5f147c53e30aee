"use strict";
// The script of a report page. Without it the page shows all text, tables and plots, and each INT8 image once.

const root = document.documentElement;
root.classList.add("scripted");
const selectAll = (selector, within = document) => [...within.querySelectorAll(selector)];
const select = (selector) => document.querySelector(selector);

// -- light and dark: the system's choice until the button is pressed ---------------------------------------------------

const themeButton = select("#theme");
const THEME_KEY = "int8run-theme";

// A page in a frame without storage forgets the choice.
const readTheme = () => {
  try {
    return localStorage.getItem(THEME_KEY);
  } catch {
    return null;
  }
};
const saveTheme = (theme) => {
  try {
    localStorage.setItem(THEME_KEY, theme);
  } catch {
    // see readTheme
  }
};
const isDark = () => {
  if (root.dataset.theme) return root.dataset.theme === "dark";
  return matchMedia("(prefers-color-scheme: dark)").matches;
};
const labelThemeButton = () => { themeButton.textContent = isDark() ? "Light" : "Dark"; };

const savedTheme = readTheme();
if (["light", "dark"].includes(savedTheme)) root.dataset.theme = savedTheme;
themeButton.hidden = false;
themeButton.addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  saveTheme(root.dataset.theme);
  labelThemeButton();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", labelThemeButton);
labelThemeButton();

// -- tables that sort; missing values stay last ------------------------------------------------------------------------

const compareValues = (a, b) => {
  const [x, y] = [Number(a), Number(b)];
  const areNumbers = !Number.isNaN(x) && !Number.isNaN(y);
  return areNumbers ? x - y : a.localeCompare(b, undefined, { numeric: true });
};
const readValue = (row, column) => {
  const text = row.cells[column]?.dataset.value ?? "";
  return text.replace(/^(-?)inf$/, "$1Infinity");
};
const sortRows = (table, column, isDescending) => {
  const rows = selectAll("tbody tr:not(.error-row)", table);
  rows.sort((a, b) => {
    const [x, y] = [readValue(a, column), readValue(b, column)];
    if (x === "" || y === "") return (x === "") - (y === "");
    return (isDescending ? -1 : 1) * compareValues(x, y);
  });
  rows.forEach((row) => {
    // a run's error follows its row
    const next = row.nextElementSibling;
    const errorRow = next?.classList.contains("error-row") ? [next] : [];
    row.parentElement.append(row, ...errorRow);
  });
};
selectAll("table.sortable").forEach((table) => {
  const headings = selectAll("thead th", table);
  headings.forEach((heading, column) => heading.firstElementChild.addEventListener("click", () => {
    const isDescending = heading.ariaSort === "ascending";
    headings.forEach((other) => { other.ariaSort = "none"; });
    heading.ariaSort = isDescending ? "descending" : "ascending";
    sortRows(table, column, isDescending);
  }));
});

// -- the image gallery -------------------------------------------------------------------------------------------------

// The images of a mode, the lower one first.
const LAYERS_OF_MODE = {
  int8: ["int8"],
  float: ["float"],
  slider: ["float", "int8"],
  input: ["input", "int8"],
  flicker: ["float", "int8"],
  difference: ["difference"],
};
// the modes with a divider, and what is left of it
const LEFT_OF_DIVIDER = { slider: "float", input: "input" };
// 1.7 changes a second: fast enough to see a difference move, slow enough to be safe.
const FLICKER_MS = 600;
const PIXELATED_PX = 256; // images up to this size are enlarged without smoothing: one sees what was generated
const DRAG_PX = 4; // a shorter move is a click

const gallery = select("#gallery");
const uris = gallery ? JSON.parse(select("#deferred-images").textContent) : {}; // every image by its id
if (gallery) {
  selectAll("img[data-image-id]", gallery).forEach((img) => { uris[img.dataset.imageId] = img.src; });

  const divider = select("#divider");
  const imageSize = select("#image-size");
  const lightbox = select("#lightbox");
  const lightboxTile = select("#lightbox-tile");
  const tiles = selectAll(".tile", gallery);
  let mode = "int8";
  let flickerTimer = null;
  let openIndex = -1; // of the tile in the lightbox

  const markPixelated = (img) => {
    const isEnlarged = img.naturalWidth < img.clientWidth && img.naturalWidth <= PIXELATED_PX;
    img.classList.toggle("pixels", isEnlarged);
  };
  const showLayer = (tile, layer, id) => {
    let img = tile.querySelector(`.${layer}`);
    if (!id) {
      img?.remove();
      return;
    }
    if (!img) {
      img = document.createElement("img");
      img.className = layer;
      img.alt = "";
      img.draggable = false;
      tile.append(img);
    }
    img.onload = () => markPixelated(img);
    if (img.src !== uris[id]) img.src = uris[id];
    else if (img.complete) img.onload();
  };
  const showTile = (tile) => {
    if (tile.dataset.fixed) { // an input looks the same in every mode
      tile.classList.remove("no-float", "no-input");
      showLayer(tile, "under", tile.dataset.fixed);
      showLayer(tile, "over", undefined);
      return;
    }
    const ids = LAYERS_OF_MODE[mode].map((name) => tile.dataset[name]);
    const isMissing = ids.some((id) => !id);
    tile.classList.toggle("no-float", isMissing && mode !== "input");
    tile.classList.toggle("no-input", isMissing && mode === "input");
    showLayer(tile, "under", isMissing ? tile.dataset.int8 : ids[0]);
    showLayer(tile, "over", isMissing ? undefined : ids[1]);
  };
  const showMode = () => {
    [gallery, lightbox].forEach((part) => {
      part.dataset.mode = mode;
      part.classList.toggle("slides", mode in LEFT_OF_DIVIDER);
      part.classList.remove("second");
    });
    if (divider) {
      select("#divider-label").hidden = !(mode in LEFT_OF_DIVIDER);
      const left = LEFT_OF_DIVIDER[mode] ?? "float";
      select("#divider-left").textContent = left;
      divider.ariaLabel = `Divider: ${left} on the left, INT8 on the right`;
    }
    tiles.forEach(showTile);
    if (openIndex >= 0) enlarge(openIndex);
    clearInterval(flickerTimer);
    if (mode === "flicker") {
      flickerTimer = setInterval(() => [gallery, lightbox].forEach((part) => part.classList.toggle("second")), FLICKER_MS);
    }
  };
  selectAll("input[name=mode]").forEach((input) => {
    if (input.checked) mode = input.value; // browsers keep the choice over a reload
    input.addEventListener("change", () => {
      mode = input.value;
      showMode();
    });
  });

  // the divider and the size of the images
  const setDivider = (percent) => {
    divider.value = percent;
    root.style.setProperty("--divider", `${divider.value}%`);
  };
  divider?.addEventListener("input", () => setDivider(divider.value));
  if (divider) setDivider(divider.value);
  if (matchMedia("(max-width: 640px)").matches) imageSize.value = 132;
  const setImageSize = () => {
    root.style.setProperty("--image-size", `${imageSize.value}px`);
    selectAll("img", gallery).forEach((img) => img.onload?.());
  };
  imageSize.addEventListener("input", setImageSize);
  setImageSize();

  // a drag over any image moves all dividers; a press without a move enlarges
  let wasDragged = false;
  const drag = (event) => {
    const tile = event.target.closest?.(".tile");
    if (!(mode in LEFT_OF_DIVIDER) || !tile || tile.dataset.fixed || event.buttons === 0) return;
    if (event.type === "pointerdown") {
      wasDragged = false;
      tile.setPointerCapture(event.pointerId);
      tile.dataset.pressedAt = event.clientX;
      return;
    }
    if (!wasDragged && Math.abs(event.clientX - tile.dataset.pressedAt) < DRAG_PX) return;
    wasDragged = true;
    const box = tile.getBoundingClientRect();
    setDivider((100 * (event.clientX - box.left)) / box.width);
  };
  ["pointerdown", "pointermove"].forEach((type) => {
    [gallery, lightbox].forEach((part) => part.addEventListener(type, drag));
  });
  gallery.addEventListener("dragstart", (event) => event.preventDefault());

  // one image enlarged
  const fitIntoWindow = (width, height) => {
    const room = Math.min((innerWidth - 48) / width, (innerHeight - 190) / height);
    if (room < 1) return room;
    return width <= PIXELATED_PX ? Math.floor(room) : Math.min(room, 2);
  };
  const enlarge = (index) => {
    openIndex = index;
    const tile = tiles[index];
    const img = tile.querySelector("img");
    ["int8", "float", "difference", "input", "fixed"].forEach((name) => {
      if (tile.dataset[name]) lightboxTile.dataset[name] = tile.dataset[name];
      else delete lightboxTile.dataset[name];
    });
    const texts = [tile.dataset.run, tile.dataset.caption];
    if (!tile.dataset.fixed) {
      texts.push(tile.parentElement.querySelector(".below-image").textContent.trim().replace(/^#\d+\s*/, ""));
    }
    select("#lightbox-caption").textContent = texts.join(" · ");
    const [width, height] = [img.naturalWidth || 64, img.naturalHeight || 64];
    lightboxTile.style.width = `${Math.round(width * fitIntoWindow(width, height))}px`;
    if (!lightbox.open) lightbox.showModal();
    showTile(lightboxTile);
  };
  tiles.forEach((tile, index) => tile.addEventListener("click", (event) => {
    if (wasDragged && event.detail > 0) {
      wasDragged = false;
      return;
    }
    enlarge(index);
  }));
  lightbox.addEventListener("close", () => {
    tiles[openIndex]?.focus();
    openIndex = -1;
  });
  lightbox.addEventListener("click", (event) => { if (event.target === lightbox) lightbox.close(); });

  // the next image in a direction, past cells without one
  const moveTo = (dx, dy) => {
    const cell = tiles[openIndex].closest("td");
    const rows = selectAll("tr.image-row", gallery);
    let row = rows.indexOf(cell.parentElement);
    let column = cell.cellIndex;
    do {
      row += dy;
      column += dx;
    } while (rows[row]?.cells[column] && !rows[row].cells[column].querySelector(".tile"));
    const tile = rows[row]?.cells[column]?.querySelector(".tile");
    if (tile) enlarge(tiles.indexOf(tile));
  };
  const STEP_OF_KEY = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  lightbox.addEventListener("keydown", (event) => {
    if (!STEP_OF_KEY[event.key]) return;
    event.preventDefault();
    moveTo(...STEP_OF_KEY[event.key]);
  });
  selectAll("[data-step]", lightbox).forEach((button) => {
    button.addEventListener("click", () => moveTo(Number(button.dataset.step), 0));
  });
  showMode();
}

// -- the heatmap of layers ---------------------------------------------------------------------------------------------

const heatmap = select("#heatmap");
if (heatmap) {
  const body = heatmap.tBodies[0];
  const rows = [...body.rows];
  const worstFirst = select("#worst-first");
  const hideFloat = select("#hide-float");
  const filter = select("#filter");

  const readWorst = (row) => (row.dataset.worst === "inf" ? Infinity : Number(row.dataset.worst));
  const compareWorst = (a, b) => {
    const [x, y] = [readWorst(a), readWorst(b)];
    if (x === y) return 0; // also where both are infinite, whose difference is not a number
    return x < y ? -1 : 1;
  };
  const showRows = () => {
    const text = filter.value.trim().toLowerCase();
    rows.forEach((row) => {
      const isFiltered = !row.cells[0].textContent.toLowerCase().includes(text);
      row.hidden = isFiltered || (hideFloat.checked && row.classList.contains("all-float"));
    });
    body.append(...(worstFirst.checked ? rows.toSorted(compareWorst) : rows));
    const numShown = rows.filter((row) => !row.hidden).length;
    const numLayers = `${rows.length} layers`;
    select("#num-layers").textContent = numShown < rows.length ? `${numShown} of ${numLayers}` : numLayers;
  };
  [worstFirst, hideFloat, filter].forEach((input) => input.addEventListener("input", showRows));
  showRows();
}

// -- commands ----------------------------------------------------------------------------------------------------------

selectAll(".copy").forEach((button) => {
  if (!navigator.clipboard) {
    button.remove();
    return;
  }
  button.addEventListener("click", async () => {
    const command = button.previousElementSibling;
    try {
      await navigator.clipboard.writeText(command.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(command);
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
});
