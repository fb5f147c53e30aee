// -- the blind comparison ----------------------------------------------------------------------------------------------
// Joined to page.js. Pairs are shown without names; what is chosen stays on this page until it is saved as a file, which
// int8run task=report task.votes=FILE reads.

const Z_95 = 1.959963984540054; // of the normal distribution: 95 % lie within
const VOTES_FORMAT = 1;

// numbers in [0, 1) that a seed determines (mulberry32)
const makeRandom = (seed) => {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
};
const shuffle = (items, random) => {
  const shuffled = [...items];
  for (let last = shuffled.length - 1; last > 0; last -= 1) {
    const other = Math.floor(random() * (last + 1));
    [shuffled[last], shuffled[other]] = [shuffled[other], shuffled[last]];
  }
  return shuffled;
};
// Wilson's interval of a share
const computeWilson = (wins, total) => {
  const share = wins / total;
  const center = share + Z_95 ** 2 / (2 * total);
  const margin = Z_95 * Math.sqrt((share * (1 - share)) / total + Z_95 ** 2 / (4 * total ** 2));
  const scale = 1 + Z_95 ** 2 / total;
  return [Math.max(0, (center - margin) / scale), Math.min(1, (center + margin) / scale)];
};
const countNoun = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;

const blindSection = select("#blind");
if (blindSection) {
  const data = JSON.parse(select("#blind-data").textContent);
  const names = Object.fromEntries(data.contenders.map(({ key, name }) => [key, name]));
  const [first, second] = [select("#blind-first"), select("#blind-second")];
  const seedInput = select("#blind-seed");
  const dialog = select("#blind-dialog");
  const startButton = select("#blind-start");
  const saveButton = select("#blind-save");
  const drawn = crypto.getRandomValues(new Uint32Array(3));
  const session = [...drawn.slice(1)].map((number) => number.toString(16).padStart(8, "0")).join("");
  const rounds = new Map(); // by the two contenders: seed and votes
  let current = null; // the round in the dialog: { seed, pairs, votes }
  let isSaved = true;
  seedInput.value = drawn[0];

  // The image of a contender; the float model has one for each run that it was compared with.
  const findImage = (sample, contender, opponent) =>
    contender === "float" ? sample.floats[opponent] : sample.images[contender];
  const listPairs = () => {
    const pairs = [];
    let numEqual = 0;
    data.samples.forEach((sample, index) => {
      const ids = [findImage(sample, first.value, second.value), findImage(sample, second.value, first.value)];
      if (!ids[0] || !ids[1]) return;
      if (ids[0] === ids[1]) numEqual += 1;
      else pairs.push({ sample: index, keys: [first.value, second.value], ids });
    });
    return { pairs, numEqual };
  };
  const arrange = (pairs, seed) => {
    const random = makeRandom(seed);
    return shuffle(pairs, random).map(({ sample, keys, ids }) => {
      const order = random() < 0.5 ? [0, 1] : [1, 0];
      return { sample, left: keys[order[0]], right: keys[order[1]], ids: order.map((side) => ids[side]) };
    });
  };

  const showCount = () => {
    const { pairs, numEqual } = listPairs();
    const texts = [countNoun(pairs.length, "pair")];
    if (first.value === second.value) texts[0] = "Choose two different ones";
    else if (numEqual) texts.push(`${numEqual} more with identical images, which are not asked`);
    select("#blind-count").textContent = `${texts.join("; ")}.`;
    startButton.disabled = pairs.length === 0;
  };
  [first, second].forEach((choice) => choice.addEventListener("change", showCount));

  const describeRound = (keys, votes) => {
    const wins = keys.map((key) => votes.filter((vote) => vote[vote.choice] === key).length);
    const numTies = votes.filter((vote) => vote.choice === "equal").length;
    const numDecided = wins[0] + wins[1];
    const counts = `${names[keys[1]]} was better ${countNoun(wins[1], "time")}, ${names[keys[0]]} `
      + `${countNoun(wins[0], "time")}, no difference ${countNoun(numTies, "time")}`;
    if (!numDecided) return `${counts}; without a decided vote there is no win rate.`;
    const [low, high] = computeWilson(wins[1], numDecided).map((share) => Math.round(100 * share));
    const rate = Math.round((100 * wins[1]) / numDecided);
    return `${counts}; win rate ${rate} % of the decided votes (95 % interval ${low}–${high} %).`;
  };
  const showResults = () => {
    const items = [...rounds.values()].map(({ keys, votes }) => {
      const item = document.createElement("li");
      item.textContent = describeRound(keys, votes);
      return item;
    });
    select("#blind-results").replaceChildren(...items);
    saveButton.hidden = rounds.size === 0;
  };

  const showPair = () => {
    const { pairs, votes } = current;
    if (votes.length === pairs.length) {
      dialog.close();
      return;
    }
    const pair = pairs[votes.length];
    select("#blind-question").textContent = `Which one is better? ${data.samples[pair.sample].caption}`;
    select("#blind-position").textContent = `${votes.length + 1} of ${pairs.length}`;
    select("#blind-progress").max = pairs.length;
    select("#blind-progress").value = votes.length;
    select("#blind-back").disabled = votes.length === 0;
    selectAll(".blind-pair img").forEach((img, side) => {
      img.onload = () => img.classList.toggle("pixels", img.naturalWidth <= 256 && img.naturalWidth < img.clientWidth);
      img.src = uris[pair.ids[side]];
    });
  };
  const choose = (choice) => {
    const { sample, left, right } = current.pairs[current.votes.length];
    current.votes.push({ sample, left, right, choice });
    isSaved = false;
    showPair();
  };
  const goBack = () => {
    current.votes.pop();
    showPair();
  };

  startButton.addEventListener("click", () => {
    const { pairs } = listPairs();
    const seed = Number(seedInput.value) >>> 0;
    seedInput.value = seed;
    current = { seed, keys: [first.value, second.value], pairs: arrange(pairs, seed), votes: [] };
    dialog.showModal();
    showPair();
  });
  // What was chosen counts, also of a round that is not finished; a second round of a pair takes the place of the first.
  dialog.addEventListener("close", () => {
    const { seed, keys, votes } = current;
    if (votes.length) rounds.set([...keys].sort().join(" "), { seed, keys, votes });
    select(".blind-pair img").removeAttribute("src");
    showResults();
  });
  const CHOICE_OF_KEY = { ArrowLeft: "left", ArrowRight: "right", "=": "equal" };
  dialog.addEventListener("keydown", (event) => {
    const choice = CHOICE_OF_KEY[event.key];
    const isBack = event.key === "Backspace" && current.votes.length > 0;
    if ((!choice && !isBack) || event.repeat) return;
    event.preventDefault();
    if (choice) choose(choice);
    else goBack();
  });
  selectAll("[data-choice]", dialog).forEach((button) => {
    button.addEventListener("click", () => choose(button.dataset.choice));
  });
  select("#blind-back").addEventListener("click", goBack);

  saveButton.addEventListener("click", () => {
    const content = {
      int8run_votes: VOTES_FORMAT,
      report: data.report,
      title: data.title,
      session,
      seeds: [...rounds.values()].map(({ keys, seed }) => ({ compared: keys, seed })),
      votes: [...rounds.values()].flatMap(({ votes }) => votes),
    };
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify(content, null, 2)], { type: "application/json" }));
    link.download = `votes_${data.report}_${session}.json`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
    isSaved = true;
  });
  addEventListener("beforeunload", (event) => {
    if (!isSaved) event.preventDefault();
  });
  showCount();
}
