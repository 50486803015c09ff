// The page of `enfilade serve`: sends a photo to /predict and shows what comes back. Nothing is kept, nothing fetched
// from elsewhere.
"use strict";

const $ = (id) => document.getElementById(id);
const canvases = ["photo", "labels", "depth"].map($);
const LONGEST = 1280; // pixels of a canvas; what is read at the pointer has the photo's own resolution
let served = null; // the answer of /models
let ramp = []; // colours of depth, near to far
let newest = null; // the file that was chosen last, and how it was sent
let photo = null; // the same of what is shown: downloads ask for it again
let shown = null; // {width, height, labels, metres, classes, at}
let asked = 0; // the newest request: answers to older ones are dropped
let stream = null;

// ------------------------------------------------------------------------------------------------------------ requests

function say(text, bad = false) {
  const sentence = text.charAt(0).toUpperCase() + text.slice(1);
  $("state").textContent = /^$|[.…]$/.test(sentence) ? sentence : `${sentence}.`;
  $("state").classList.toggle("bad", bad);
}

async function post({ file, model, fov }, accept) {
  const body = new FormData();
  body.append("image", file, "photo");
  body.append("model", model);
  if (fov) body.append("fov", fov);
  let answer;
  try {
    answer = await fetch("predict", { method: "POST", body, headers: { Accept: accept } });
  } catch {
    throw new Error("The service cannot be reached.");
  }
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => ({}));
  throw new Error(told.error || `The service answered ${answer.status}.`);
}

async function predict(file) {
  if (!file || !served) return;
  const mine = ++asked;
  const sent = (newest = { file, model: $("model").value, fov: $("fov").value });
  say("Looking at the photo …");
  $("main").setAttribute("aria-busy", "true");
  try {
    const most = served.limits.megabytes;
    if (file.size > most * 1e6) throw new Error(`This photo is larger than ${most} MB.`);
    const answer = await (await post(sent, "application/json")).json();
    const [labels, depth] = await Promise.all(["labels", "depth"].map((name) => map(answer.images[name])));
    const picture = await createImageBitmap(file).catch(() => null); // such as HEIC where only Safari can
    if (mine === asked) show(sent, answer, labels, depth, picture);
  } catch (error) {
    if (mine === asked) say(error.message, true);
  } finally {
    if (mine === asked) $("main").removeAttribute("aria-busy");
  }
}

async function download(button) {
  button.disabled = true;
  try {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await (await post(photo, button.dataset.type)).blob());
    link.download = button.dataset.name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  } catch (error) {
    say(error.message, true);
  }
  button.disabled = false;
}

// --------------------------------------------------------------------------------------------------------------- maps

// A grey PNG of 8 or 16 bits as numbers. Browsers decode PNG to 8 bits, too few for millimetres.
async function map(base64) {
  if (!base64) return null;
  const data = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const view = new DataView(data.buffer);
  const [width, height, size] = [view.getUint32(16), view.getUint32(20), data[24] / 8];
  const parts = [];
  for (let at = 8; at < data.length; at += 12 + view.getUint32(at)) {
    if (view.getUint32(at + 4) === 0x49444154) parts.push(data.subarray(at + 8, at + 8 + view.getUint32(at))); // IDAT
  }
  const packed = new Blob(parts).stream().pipeThrough(new DecompressionStream("deflate"));
  const rows = new Uint8Array(await new Response(packed).arrayBuffer());
  const line = width * size;
  for (let y = 0; y < height; y++) { // PNG, section 9: each row says how it differs from its neighbours
    const filter = rows[y * (line + 1)];
    const row = y * (line + 1) + 1;
    for (let x = 0; x < line; x++) {
      const left = x < size ? 0 : rows[row + x - size];
      const up = y === 0 ? 0 : rows[row + x - line - 1];
      const corner = x < size || y === 0 ? 0 : rows[row + x - line - 1 - size];
      let guess = 0;
      if (filter === 1) guess = left;
      else if (filter === 2) guess = up;
      else if (filter === 3) guess = (left + up) >> 1;
      else if (filter === 4) {
        const [a, b, c] = [Math.abs(up - corner), Math.abs(left - corner), Math.abs(left + up - 2 * corner)];
        guess = a <= b && a <= c ? left : b <= c ? up : corner;
      }
      rows[row + x] += guess;
    }
  }
  const values = new Uint16Array(width * height);
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0, at = y * (line + 1) + 1; x < width; x++, at += size) {
      values[i++] = size === 2 ? (rows[at] << 8) | rows[at + 1] : rows[at];
    }
  }
  return values;
}

function paint(canvas, colour) {
  const { width, height } = shown;
  const picture = canvas.getContext("2d").createImageData(canvas.width, canvas.height);
  for (let y = 0, i = 0; y < canvas.height; y++) {
    const row = Math.floor(((y + 0.5) * height) / canvas.height) * width;
    for (let x = 0; x < canvas.width; x++, i += 4) {
      const [r, g, b] = colour(row + Math.floor(((x + 0.5) * width) / canvas.width));
      picture.data[i] = r;
      picture.data[i + 1] = g;
      picture.data[i + 2] = b;
      picture.data[i + 3] = 255;
    }
  }
  canvas.getContext("2d").putImageData(picture, 0, 0);
}

function show(sent, answer, labels, millimetres, picture) {
  photo = sent;
  const classes = served.models.find((model) => model.name === answer.model).classes;
  const { width, height } = answer;
  shown = { width, height, labels, millimetres, classes, at: null };
  $("result").hidden = false;
  document.body.classList.add("done");
  hint("Another photo: drop it here, or", "Another photo");
  const scale = Math.min(1, LONGEST / Math.max(width, height));
  for (const canvas of canvases) {
    canvas.width = Math.max(1, Math.round(width * scale));
    canvas.height = Math.max(1, Math.round(height * scale));
  }
  const context = $("photo").getContext("2d");
  context.fillStyle = "#fff"; // as the service lays what is transparent over white
  context.fillRect(0, 0, $("photo").width, $("photo").height);
  context.fillStyle = "#000";
  if (picture) context.drawImage(picture, 0, 0, $("photo").width, $("photo").height);
  else context.fillText("This browser cannot show the photo.", 8, 20);
  $("labelled").hidden = !labels;
  $("measured").hidden = !millimetres;
  const unknown = [52, 52, 56];
  if (labels) paint($("labels"), (i) => (classes[labels[i]] ? classes[labels[i]].colour : unknown));
  if (millimetres && answer.depth) {
    const { near, far } = answer.depth;
    const step = 255 / Math.max(1e-6, far - near);
    const colour = (mm) => ramp[Math.max(0, Math.min(255, Math.round((mm / 1000 - near) * step)))];
    paint($("depth"), (i) => (millimetres[i] ? colour(millimetres[i]) : unknown));
    $("near").textContent = `${near.toFixed(2)} m`;
    $("far").textContent = `${far.toFixed(2)} m`;
  }
  legend(answer, classes);
  const camera = answer.camera;
  const told = camera && { exif: "from the photo", given: "as given", assumed: "assumed" }[camera.source];
  $("facts").textContent = [
    `${width} × ${height} pixels`,
    camera && `camera ${told}: ${camera.fov.toFixed(0)}° across`,
    `network ${answer.seconds.toFixed(2)} s`,
  ].filter(Boolean).join(" · ");
  say(camera && camera.source === "assumed" && millimetres
    ? "The photo does not tell its field of view, so one is assumed. Metres are right up to a factor." : "");
  for (const button of $("downloads").querySelectorAll("[data-type$=ply]")) button.hidden = !millimetres;
  room();
  point(Math.floor(width / 2), Math.floor(height / 2));
}

// Nobody drops a file with a finger.
function hint(mouse, finger) {
  $("hint").textContent = matchMedia("(pointer: coarse)").matches ? finger : mouse;
}

function legend(answer, classes) {
  const entries = Object.entries(answer.classes || {}).filter(([, share]) => share >= 0.005);
  $("legend").replaceChildren(...entries.map(([name, share]) => {
    const item = document.createElement("li");
    const swatch = document.createElement("span");
    swatch.className = "swatch";
    swatch.style.background = `rgb(${classes.find((c) => c.name === name).colour})`;
    const part = document.createElement("span");
    part.className = "faint";
    part.textContent = `${(100 * share).toFixed(0)} %`;
    item.append(swatch, name, part);
    return item;
  }));
}

// The room opens by a form, not by fetch: the new tab is then a page of the service's own, with its own policy.
function room() {
  $("room").hidden = !served.completion;
  if (!served.completion) return;
  const files = new DataTransfer();
  files.items.add(new File([photo.file], "photo", { type: photo.file.type }));
  const [image, fov] = $("room").querySelectorAll("input");
  image.files = files.files;
  fov.disabled = !photo.fov;
  fov.value = photo.fov;
}

// -------------------------------------------------------------------------------------------------------------- point

function point(x, y) {
  const { width, height, labels, millimetres, classes } = shown;
  x = Math.max(0, Math.min(width - 1, x));
  y = Math.max(0, Math.min(height - 1, y));
  shown.at = [x, y];
  const i = y * width + x;
  const parts = [];
  if (labels) parts.push(classes[labels[i]] ? classes[labels[i]].name : "no label");
  if (millimetres) parts.push(millimetres[i] ? `${(millimetres[i] / 1000).toFixed(2)} m` : "depth unknown");
  $("here").textContent = parts.join(", ");
  for (const canvas of canvases) {
    let dot = canvas.nextElementSibling;
    if (!dot) {
      dot = document.createElement("div");
      dot.className = "dot";
      canvas.after(dot);
    }
    dot.style.left = `${(100 * (x + 0.5)) / width}%`;
    dot.style.top = `${(100 * (y + 0.5)) / height}%`;
  }
}

for (const canvas of canvases) {
  const follow = (event) => {
    if (!shown) return;
    const box = canvas.getBoundingClientRect();
    point(
      Math.floor(((event.clientX - box.left) / box.width) * shown.width),
      Math.floor(((event.clientY - box.top) / box.height) * shown.height),
    );
  };
  canvas.addEventListener("pointermove", follow);
  canvas.addEventListener("pointerdown", follow);
  canvas.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!way || !shown) return;
    event.preventDefault();
    const step = Math.max(1, Math.round(shown.width / (event.shiftKey ? 10 : 50)));
    point(shown.at[0] + way[0] * step, shown.at[1] + way[1] * step);
  });
}

// -------------------------------------------------------------------------------------------------------------- photo

$("choose").addEventListener("click", () => $("file").click());
for (const input of [$("file"), $("capture")]) {
  input.addEventListener("change", () => {
    predict(input.files[0]);
    input.value = ""; // the same file may be chosen again
  });
}

function filming(on) {
  $("video").hidden = $("shooting").hidden = !on;
  $("ways").hidden = $("hint").hidden = on;
  if (!on && stream) {
    for (const track of stream.getTracks()) track.stop();
    stream = null;
    $("camera").focus();
  }
}

$("camera").addEventListener("click", async () => {
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment", width: { ideal: 1920 } } });
  } catch { // none, not allowed, or no https: a phone then offers its camera for the file
    return $("capture").click();
  }
  $("video").srcObject = stream;
  filming(true);
  await $("video").play();
  $("shoot").focus();
});
$("stop").addEventListener("click", () => filming(false));
$("shoot").addEventListener("click", () => {
  const video = $("video");
  const still = document.createElement("canvas");
  [still.width, still.height] = [video.videoWidth, video.videoHeight];
  still.getContext("2d").drawImage(video, 0, 0);
  filming(false);
  still.toBlob(predict, "image/jpeg", 0.92);
});

for (const type of ["dragenter", "dragover", "dragleave", "drop"]) {
  window.addEventListener(type, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", type === "dragenter" || type === "dragover");
    // Systems that do not know a type, such as HEIC, leave it empty: the service will tell
    if (type === "drop") {
      const files = [...event.dataTransfer.files];
      predict(files.find((file) => file.type.startsWith("image/")) || files[0]);
    }
  });
}
window.addEventListener("paste", (event) => predict(event.clipboardData.files[0]));
for (const id of ["model", "fov"]) {
  $(id).addEventListener("change", () => {
    if (newest && newest[id] !== $(id).value) predict(newest.file);
  });
}
for (const button of document.querySelectorAll("[data-type]")) button.addEventListener("click", () => download(button));

$("room").addEventListener("submit", () => say("The room opens in a new tab as soon as it is complete."));
hint("Drop a photo of a room here, or", "A photo of a room");

fetch("models")
  .then((answer) => answer.json())
  .then((answer) => {
    served = answer;
    ramp = answer.ramp.match(/.{6}/g).map((hex) => [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16)));
    $("bar").style.background = `linear-gradient(to right, ${ramp.filter((_, i) => i % 15 === 0).map((c) => `rgb(${c})`)})`;
    for (const model of answer.models.filter((m) => !m.takes_depth)) $("model").add(new Option(model.name));
  })
  .catch(() => say("The service cannot be reached.", true));
