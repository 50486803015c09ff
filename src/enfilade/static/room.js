"use strict";
const $ = (id) => document.getElementById(id);
const room = JSON.parse($("room").textContent);
const [nx, ny, nz] = room.shape;  // along X, up, along Y: the array's axes
const { origin, size, camera } = room;

// The grid has a border of one empty voxel all round, so that neighbours need no bounds.
const steps = [(ny + 2) * (nz + 2), nz + 2, 1];
const cells = new Uint16Array((nx + 2) * steps[0]);  // what is drawn: 0 or label, + 128 if dimmed, + 256 if completed
const place = (i, j, k) => (i + 1) * steps[0] + (j + 1) * steps[1] + k + 1;
const where = (p) => [Math.floor(p / steps[0]) - 1, (Math.floor(p / steps[1]) % (ny + 2)) - 1, (p % steps[1]) - 1];
const world = (i, j, k) => new THREE.Vector3(origin[0] + size * i, origin[1] + size * k, origin[2] + size * j);

const shown = room.classes.map((_, label) => label > 0 && !room.hidden.includes(label));
let places, bytes, layers, binned;  // of each labelled voxel: its place in `cells`; its label, + 128 if the camera saw
                                    // it; its height in voxels; its bin
let mode = "all", cut = ny;

function tell(sentence) {
  $("note").textContent = document.documentElement.dataset.error = sentence;
  $("note").hidden = false;
}

/* ----------------------------------------------------------------------------------------------------- voxels */

async function unpack(text) {
  const packed = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

const bin = Math.max(1, Math.round(0.08 / size));  // voxels; `filled` says how full each bin is, for the shading
const bins = room.shape.map((n) => Math.ceil(n / bin) + 2);
const filled = new THREE.Data3DTexture(new Uint8Array(bins[0] * bins[1] * bins[2]), bins[2], bins[1], bins[0]);
Object.assign(filled, { format: THREE.RedFormat, minFilter: THREE.LinearFilter, magFilter: THREE.LinearFilter,
                        unpackAlignment: 1 });

function listVoxels(volume) {
  const labelled = (byte) => (byte & 127) > 0 && (byte & 127) < 127;  // 0 is empty, 127 unknown
  const count = volume.reduce((sum, byte) => sum + labelled(byte), 0);
  [places, bytes, layers, binned] = [Uint32Array, Uint8Array, Uint16Array, Uint32Array].map((kind) => new kind(count));
  const inBin = (x) => Math.floor(x / bin) + 1;
  let n = 0, at = 0;
  for (let i = 0; i < nx; i++) for (let j = 0; j < ny; j++) for (let k = 0; k < nz; k++) {
    const byte = volume[at++];
    if (!labelled(byte)) continue;
    places[n] = place(i, j, k);
    layers[n] = j;
    binned[n] = (inBin(i) * bins[1] + inBin(j)) * bins[2] + inBin(k);
    bytes[n++] = byte;
  }
}

// Draw what is switched on: fill `cells`, then list the faces that border on nothing, as strips.
function rebuild() {
  cells.fill(0);
  const counts = new Uint32Array(filled.image.data.length);
  for (let n = 0; n < places.length; n++) {
    const label = bytes[n] & 127, completed = room.observed && bytes[n] < 128;
    if (!shown[label] || layers[n] >= cut || (completed && mode === "seen")) continue;
    cells[places[n]] = label + (completed ? (mode === "dim" ? 384 : 256) : 0);
    counts[binned[n]]++;
  }
  for (let n = 0; n < counts.length; n++) filled.image.data[n] = (255 * counts[n]) / bin ** 3;
  filled.needsUpdate = true;

  const sides = steps.flatMap((step) => [-step, step]);
  let count = 0, n = 0;
  for (const p of places) if (cells[p]) for (const side of sides) if (!cells[p + side]) count++;
  const list = new Uint16Array(4 * count);
  for (const p of places) {
    const cell = cells[p], code = 8 * (cell & 127) + 1024 * ((cell >> 7) & 1);
    for (let side = 0; cell && side < 6; side++) {
      const out = sides[side], along = steps[((side >> 1) + 2) % 3];
      const same = (q) => cells[q] === cell && !cells[q + out];
      if (!same(p) || same(p - along)) continue;
      for (let q = p, length; same(q); q += length * along) {  // up to 31 faces in a row are one
        for (length = 1; length < 31 && same(q + length * along);) length++;
        list.set([...where(q), code + side + 2048 * length], n);
        n += 4;
      }
    }
  }
  const rows = Math.max(1, Math.ceil(n / 4 / WIDTH)), faces = new Uint16Array(4 * WIDTH * rows);
  faces.set(list.subarray(0, n));
  material.uniforms.faces.value?.dispose();
  material.uniforms.faces.value = Object.assign(new THREE.DataTexture(faces, WIDTH, rows), {
    format: THREE.RGBAIntegerFormat, type: THREE.UnsignedShortType, internalFormat: "RGBA16UI", needsUpdate: true,
  });
  geometry.setDrawRange(0, (6 * n) / 4);
  document.documentElement.dataset.faces = count;
}

/* ------------------------------------------------------------------------------------------------------ scene */

// A strip of faces is six vertices without attributes, which look up their voxel in a texture: instances of so small a
// shape are slow on many graphics cards.
const WIDTH = 2048;
const geometry = new THREE.BufferGeometry();
const material = new THREE.ShaderMaterial({
  side: THREE.DoubleSide,
  uniforms: {
    origin: { value: new THREE.Vector3(...origin) }, size: { value: size }, bin: { value: bin },
    filled: { value: filled }, faces: { value: null },
    palette: { value: room.classes.map(({ colour }) => new THREE.Vector3(...colour).divideScalar(255)) },
  },
  vertexShader: `
    uniform highp usampler2D faces;  // the first voxel; side + 8 label + 1024 if dimmed + 2048 length
    uniform vec3 origin, palette[${room.classes.length}];
    uniform float size;
    varying vec2 corner;
    varying vec3 at;
    flat varying vec3 colour, outwards;
    flat varying float dimmed;
    void main() {
      int n = gl_VertexID % 6, strip = gl_VertexID / 6;
      ivec4 cell = ivec4(texelFetch(faces, ivec2(strip % ${WIDTH}, strip / ${WIDTH}), 0));
      int code = cell.w, axis = code % 8 / 2;
      float upper = float(code % 2);
      vec3 a = vec3(0.0), b = a, c = a;
      a[axis] = 1.0, b[(axis + 1) % 3] = 1.0, c[(axis + 2) % 3] = 1.0;
      corner = vec2(n == 1 || n > 3, n == 2 || n == 3 || n == 5);
      float lap = 0.00015 * distance(cameraPosition, origin + size * vec3(cell.xzy)) / size;  // a fraction of a pixel,
      corner = mix(vec2(-lap), vec2(1.0, code / 2048) + lap, corner);  // so that no light falls between strips
      at = vec3(cell.xyz) + upper * a + corner.x * b + corner.y * c;  // in voxels, along the array's axes
      outwards = (2.0 * upper - 1.0) * a;
      colour = palette[code / 8 % 128];
      dimmed = float(code / 1024 % 2);
      vec3 point = origin + size * at.xzy;
      bool away = dot(cameraPosition - point, outwards.xzy) <= 0.0;
      gl_Position = away ? vec4(2.0, 2.0, 2.0, 1.0) : projectionMatrix * viewMatrix * vec4(point, 1.0);
    }`,
  fragmentShader: `
    uniform float bin, size;
    uniform highp sampler3D filled;
    varying vec2 corner;
    varying vec3 at;
    flat varying vec3 colour, outwards;
    flat varying float dimmed;
    float full(float metres) {  // how full the room is, so far before the face
      vec3 where = ((at + outwards * metres / size) / bin + 1.0) / vec3(textureSize(filled, 0).zyx);
      return texture(filled, where.zyx).r;
    }
    void main() {
      float sky = 0.73 + 0.08 * outwards.y;  // what lies level and open keeps the colour of the legend
      float sun = 0.25 * max(dot(outwards, normalize(vec3(-0.25, 0.75, -0.6))), 0.0);
      float shade = 0.38 * full(0.06) + 0.32 * full(0.15) + 0.35 * full(0.35);
      vec2 pixel = fwidth(corner);  // in voxels
      vec2 line = 1.0 - smoothstep(0.5 * pixel, 1.5 * pixel, min(fract(corner), 1.0 - fract(corner)));
      float edge = max(line.x, line.y) * clamp(1.3 - 5.0 * max(pixel.x, pixel.y), 0.0, 1.0);
      vec3 lit = colour * (sky + sun) * (1.0 - min(shade, 0.55)) * (1.0 - 0.16 * edge);
      gl_FragColor = vec4(lit, 1.0) * (1.0 - 0.75 * dimmed);  // the page's background shines through what is dimmed
    }`,
});

const scene = new THREE.Scene();
const voxels = new THREE.Mesh(geometry, material);
voxels.frustumCulled = false;  // its vertices do not tell where it is

const ink = new THREE.LineBasicMaterial(), faint = new THREE.LineBasicMaterial();
const segments = (points, material) =>
  new THREE.LineSegments(new THREE.BufferGeometry().setFromPoints(points), material);

const metres = [];  // the grid on the ground
for (const [axis, count, other] of [[0, nx, nz], [1, nz, nx]]) {
  for (let m = Math.ceil(origin[axis]); m <= origin[axis] + count * size; m++) {
    const n = (m - origin[axis]) / size;
    metres.push(...(axis ? [world(0, 0, n), world(other, 0, n)] : [world(n, 0, 0), world(n, 0, other)]));
  }
}

const marker = new THREE.LineSegments(new THREE.EdgesGeometry(new THREE.BoxGeometry(size, size, size)), ink);
marker.scale.setScalar(1.06);
marker.visible = false;
scene.add(voxels, segments(metres, faint), marker);

let viewer = null, heading = Math.PI / 2;  // where the photo was taken, and towards which side: angle from X
if (camera) {
  const { pose, fx, fy, cx, cy, width, height } = camera;
  const out = (u, v, depth) => {
    const ray = [((u - cx) / fx) * depth, ((v - cy) / fy) * depth, depth];
    return new THREE.Vector3(...[0, 1, 2].map((r) => pose[r][3] + ray.reduce((s, x, c) => s + x * pose[r][c], 0)));
  };
  viewer = out(0, 0, 0);
  const ahead = out(cx, cy, 1).sub(viewer);
  if (Math.hypot(ahead.x, ahead.y) > 0.1) heading = Math.atan2(ahead.y, ahead.x);
  const [l, t, r, b] = [-0.5, -0.5, width - 0.5, height - 0.5];
  const corners = [out(l, t, 0.5), out(r, t, 0.5), out(r, b, 0.5), out(l, b, 0.5)];
  const frame = segments(corners.flatMap((p, i) => [viewer, p, p, corners[(i + 1) % 4]]), ink);
  if (room.photo) {
    const plane = new THREE.BufferGeometry().setFromPoints(corners).setIndex([0, 2, 1, 0, 3, 2]);
    plane.setAttribute("uv", new THREE.BufferAttribute(new Float32Array([0, 1, 1, 1, 1, 0, 0, 0]), 2));
    const image = new Image();  // not the one in the panel, whose width is that of the panel
    const texture = new THREE.Texture(image);
    texture.colorSpace = THREE.SRGBColorSpace;
    frame.add(new THREE.Mesh(plane, new THREE.MeshBasicMaterial({ map: texture, side: THREE.DoubleSide })));
    image.onload = () => { texture.needsUpdate = true; draw(); };
    image.src = room.photo;
  }
  scene.add(frame);
  $("placed").hidden = false;
  $("framed").onchange = () => { frame.visible = $("framed").checked; draw(); };
}

/* ------------------------------------------------------------------------------------------- view and drawing */

const canvas = $("canvas");
const reach = size * Math.hypot(...room.shape);
const eye = new THREE.PerspectiveCamera(40, 1, reach / 400, 8 * reach);
eye.up.set(0, 0, 1);
let renderer = null, controls = null, stale = true, queued = false;

function draw() {
  if (queued || !renderer) return;
  queued = true;
  requestAnimationFrame(() => { queued = false; drawNow(); });
}

function drawNow() {
  if (stale) rebuild();
  stale = false;
  renderer.render(scene, eye);
}

const change = () => { stale = true; draw(); };

// From behind the camera, above and somewhat to the side; as near as all labelled voxels that are on allow.
function reset() {
  const low = [Infinity, Infinity, Infinity], high = [-Infinity, -Infinity, -Infinity];
  for (let n = 0; n < places.length; n++) {
    if (!shown[bytes[n] & 127]) continue;
    const at = where(places[n]);
    for (let a = 0; a < 3; a++) { low[a] = Math.min(low[a], at[a]); high[a] = Math.max(high[a], at[a] + 1); }
  }
  const [a, b] = low[0] < high[0] ? [world(...low), world(...high)] : [world(0, 0, 0), world(nx, ny, nz)];
  const box = [a.x, b.x].flatMap((x) => [a.y, b.y].flatMap((y) => [a.z, b.z].map((z) => new THREE.Vector3(x, y, z))));
  const [turn, tilt] = [heading + Math.PI - 0.45, 0.85];
  const back = new THREE.Vector3(Math.cos(turn) * Math.cos(tilt), Math.sin(turn) * Math.cos(tilt), Math.sin(tilt));
  const right = new THREE.Vector3().crossVectors(eye.up, back).normalize();
  const up = new THREE.Vector3().crossVectors(back, right);
  const target = a.clone().add(b).multiplyScalar(0.5);
  const slope = Math.tan((eye.fov * Math.PI) / 360) * 0.96;
  const distance = Math.max(...box.map((p) => {
    const q = p.clone().sub(target);
    return q.dot(back) + Math.max(Math.abs(q.dot(up)) / slope, Math.abs(q.dot(right)) / (slope * eye.aspect));
  }));
  controls.target.copy(target);
  eye.position.copy(target).addScaledVector(back, distance);
  controls.update();
  draw();
}

// Turn by angles (radians), come nearer by a factor, move to the right and up (shares of the distance).
function move({ turn = 0, tilt = 0, near = 1, right = 0, up = 0 }) {
  const offset = eye.position.clone().sub(controls.target), distance = offset.length() * near;
  const side = Math.atan2(offset.y, offset.x) + turn;
  const above = Math.min(Math.max(Math.asin(offset.z / offset.length()) + tilt, -1.55), 1.55);
  for (const [column, amount] of [[0, right], [1, up]]) {
    controls.target.addScaledVector(new THREE.Vector3().setFromMatrixColumn(eye.matrix, column), amount * distance);
  }
  eye.position.copy(controls.target).add(new THREE.Vector3(
    Math.cos(side) * Math.cos(above), Math.sin(side) * Math.cos(above), Math.sin(above)).multiplyScalar(distance));
  controls.update();
  draw();
}

const KEYS = {
  ArrowLeft: { turn: -0.1 }, ArrowRight: { turn: 0.1 }, ArrowUp: { tilt: 0.08 }, ArrowDown: { tilt: -0.08 },
  "+": { near: 0.9 }, "=": { near: 0.9 }, "-": { near: 1 / 0.9 },
};
const SHIFTED = {
  ArrowLeft: { right: -0.05 }, ArrowRight: { right: 0.05 }, ArrowUp: { up: 0.05 }, ArrowDown: { up: -0.05 },
};

function key(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const step = (event.shiftKey && SHIFTED[event.key]) || KEYS[event.key];
  if (!step && event.key !== "0") return;
  event.preventDefault();
  unpoint();
  step ? move(step) : reset();
}

function colours() {
  const style = getComputedStyle(document.documentElement);
  ink.color.set(style.getPropertyValue("--ink").trim());
  faint.color.set(style.getPropertyValue("--frame").trim());
  draw();
}

function save() {
  drawNow();  // the picture is gone once the browser has shown it
  const copy = Object.assign(node("canvas"), { width: canvas.width, height: canvas.height });
  const context = copy.getContext("2d");
  context.fillStyle = getComputedStyle($("stage")).backgroundColor;
  context.fillRect(0, 0, copy.width, copy.height);
  context.drawImage(canvas, 0, 0);
  copy.toBlob((blob) => {
    const link = Object.assign(node("a"), { href: URL.createObjectURL(blob), download: "room.png" });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  });
}

/* ---------------------------------------------------------------------------------------------------- pointing */

// The first drawn voxel on the line of sight through a point of the canvas (-1..1): from voxel to voxel.
function pick(x, y) {
  const sight = new THREE.Vector3(x, y, 0.5).unproject(eye).sub(eye.position).normalize();
  const d = [sight.x, sight.z, sight.y], n = room.shape;
  const o = [eye.position.x - origin[0], eye.position.z - origin[2], eye.position.y - origin[1]].map((v) => v / size);
  let enter = 0, leave = Infinity;
  for (let a = 0; a < 3; a++) {
    const [s, t] = [-o[a] / d[a], (n[a] - o[a]) / d[a]];
    [enter, leave] = [Math.max(enter, Math.min(s, t)), Math.min(leave, Math.max(s, t))];
  }
  if (!(enter < leave)) return null;
  const at = o.map((v, a) => Math.min(Math.max(Math.floor(v + d[a] * (enter + 1e-6)), 0), n[a] - 1));
  const next = d.map((s, a) => (s ? (at[a] + (s > 0) - o[a]) / s : Infinity));
  while (!cells[place(...at)]) {
    const a = next.indexOf(Math.min(...next));
    at[a] += Math.sign(d[a]);
    next[a] += Math.abs(1 / d[a]);
    if (at[a] < 0 || at[a] >= n[a]) return null;
  }
  return at;
}

let pointed = null;  // the place of the voxel with the marker

function mark(p) {
  $("tip").hidden = $("dot").hidden = true;
  marker.visible = p !== null;
  if (p !== pointed) draw();
  pointed = p;
}

const unpoint = () => mark(null);

function point(event) {
  if (event.buttons) return unpoint();  // turning
  const box = canvas.getBoundingClientRect(), [x, y] = [event.clientX - box.left, event.clientY - box.top];
  const at = pick((2 * x) / box.width - 1, 1 - (2 * y) / box.height);
  if (!at) return unpoint();
  const p = place(...at), tip = $("tip"), centre = world(...at.map((v) => v + 0.5));
  mark(p);
  marker.position.copy(centre);
  const lines = [`X ${centre.x.toFixed(2)}, Y ${centre.y.toFixed(2)}, Z ${centre.z.toFixed(2)} m`];
  if (viewer) lines.push(`${centre.distanceTo(viewer).toFixed(2)} m from the camera`);
  if (room.observed) lines.push(cells[p] & 256 ? "completed" : "seen by the camera");
  tip.replaceChildren(node("strong", room.classes[cells[p] & 127].name));
  for (const line of lines) tip.append(node("br"), line);
  tip.hidden = false;
  tip.style.left = `${Math.max(4, Math.min(x + 14, box.width - tip.offsetWidth - 4))}px`;
  tip.style.top = `${y + 18 + tip.offsetHeight < box.height ? y + 18 : Math.max(4, y - tip.offsetHeight - 12)}px`;
  if (camera && room.photo) {  // where it is in the photo
    const [u, v, depth] = [0, 1, 2].map((c) => [centre.x, centre.y, centre.z].reduce(
      (sum, value, r) => sum + camera.pose[r][c] * (value - camera.pose[r][3]), 0));
    $("dot").style.left = `${(100 * ((camera.fx * u) / depth + camera.cx + 0.5)) / camera.width}%`;
    $("dot").style.top = `${(100 * ((camera.fy * v) / depth + camera.cy + 0.5)) / camera.height}%`;
    $("dot").hidden = depth <= 0;
  }
}

/* ------------------------------------------------------------------------------------------------------- panel */

function node(kind, ...content) {
  const element = document.createElement(kind);
  element.append(...content);
  return element;
}

function fillPanel() {
  $("title").textContent = room.title;
  $("title").hidden = !room.title;
  for (const [name, value] of Object.entries(room.facts)) $("facts").append(node("dt", name), node("dd", value));
  if (room.photo) $("image").src = room.photo;
  if (room.labels) $("overlay").src = room.labels;
  $("figure").hidden = !room.photo;
  $("overlaid").hidden = !room.labels;
  $("tinted").onchange = () => { $("overlay").hidden = !$("tinted").checked; };
}

function fillLegend() {
  const total = room.classes.map(() => 0), seen = room.classes.map(() => 0);
  for (const byte of bytes) { total[byte & 127] += 1; seen[byte & 127] += byte >> 7; }
  $("modes").hidden = $("share").hidden = !room.observed;
  const order = total.map((_, label) => label).filter((label) => total[label]).sort((a, b) => total[b] - total[a]);
  const boxes = order.map((label) => {
    const box = Object.assign(node("input"), { type: "checkbox", checked: shown[label] });
    box.onchange = () => { shown[label] = box.checked; change(); };
    const swatch = Object.assign(node("span"), { className: "swatch" });
    swatch.style.background = `rgb(${room.classes[label].colour})`;
    const name = Object.assign(node("label", box, swatch, room.classes[label].name), { className: "pick" });
    const numbers = [total[label].toLocaleString("en"), (total[label] * size ** 3).toFixed(2)];
    if (room.observed) numbers.push(`${Math.round(100 * (1 - seen[label] / total[label]))} %`);
    const head = Object.assign(node("th", name), { scope: "row" });
    $("classes").append(node("tr", head, ...numbers.map((number) => node("td", number))));
    return box;
  });
  if (!boxes.length) $("classes").append(node("tr", node("td", "No voxel carries a label.")));
  const all = (on) => () => { order.forEach((label, i) => { shown[label] = boxes[i].checked = on; }); change(); };
  $("every").onclick = all(true);
  $("none").onclick = all(false);
  for (const radio of document.getElementsByName("mode")) radio.onchange = () => { mode = radio.value; change(); };

  const top = 1 + layers.reduce((most, layer) => Math.max(most, layer), 0);
  const height = () => {
    cut = $("cut").valueAsNumber;
    $("height").value = `${(origin[2] + cut * size).toFixed(2)} m`;
    $("cut").setAttribute("aria-valuetext", $("height").value);
  };
  Object.assign($("cut"), { max: top, value: top, oninput: () => { height(); change(); } });
  height();
}

async function start() {
  fillPanel();
  listVoxels(await unpack(room.voxels));
  fillLegend();
  try {
    renderer = new THREE.WebGLRenderer({ canvas, alpha: true, antialias: true });
  } catch {
    tell("This browser cannot draw in 3-D here: WebGL 2 is missing or switched off. Photo and numbers are complete.");
    $("bar").hidden = canvas.hidden = true;
    return;
  }
  renderer.setPixelRatio(Math.min(devicePixelRatio, 2));
  const fit = () => {
    const { clientWidth, clientHeight } = $("stage");
    renderer.setSize(clientWidth, clientHeight, false);
    eye.aspect = clientWidth / Math.max(clientHeight, 1);
    eye.updateProjectionMatrix();
    drawNow();
  };
  fit();
  controls = new THREE.OrbitControls(eye, canvas);
  Object.assign(controls, { minDistance: reach / 100, maxDistance: 4 * reach });
  controls.addEventListener("change", draw);
  colours();
  reset();
  new ResizeObserver(fit).observe($("stage"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", colours);
  canvas.addEventListener("keydown", key);
  canvas.addEventListener("pointermove", point);
  canvas.addEventListener("click", point);  // a tap
  canvas.addEventListener("pointerleave", unpoint);
  $("reset").onclick = reset;
  $("save").onclick = save;
}

start().catch((error) => {
  console.error(error);
  tell(`This browser could not open the room (${error.message}): try a newer one.`);
});
