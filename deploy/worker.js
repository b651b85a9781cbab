// The worker of student.html unpacks ONNX Runtime and the model, and runs the page's tasks one by one. It turns a
// picture into the same bytes as deploy/preprocess.py. deploy/porting.md describes the steps.
"use strict"

const MOST_PIXELS = 64e6 // most pixels of a picture, as in deploy/preprocess.py
const STRIP = 1 << 22 // pixels that are read at once; a phone's canvas holds about 16 million
const READS = "this page reads JPEG, PNG, WebP and GIF"
let about, ort, session

// ---- the model ----

async function unpack(text, report) { // base64 of a gzip file -> its bytes
  const { readable, writable } = new DecompressionStream("gzip")
  const unpacked = new Response(readable).arrayBuffer(), writer = writable.getWriter(), step = 1 << 20
  for (let at = 0; at < text.length; at += step) {
    const letters = atob(text.slice(at, at + step)), bytes = new Uint8Array(letters.length)
    for (let i = 0; i < letters.length; i++) bytes[i] = letters.charCodeAt(i)
    await writer.write(bytes)
    report(Math.min(step, text.length - at))
  }
  writer.close()
  return unpacked
}

async function load({ settings, parts }) {
  about = settings
  const total = Object.values(parts).reduce((sum, text) => sum + text.length, 0)
  let done = 0
  const report = count => postMessage({ progress: (done += count) / total })
  const program = new Blob([await unpack(parts.ort, report)], { type: "text/javascript" })
  const url = URL.createObjectURL(program)
  ort = await import(url)
  URL.revokeObjectURL(url)
  ort.env.wasm.wasmBinary = await unpack(parts.wasm, report)
  ort.env.wasm.numThreads = 1 // threads need shared memory, which a page from a disk does not get
  ort.env.logLevel = "error"
  session = await ort.InferenceSession.create(await unpack(parts.model, report), { executionProviders: ["wasm"] })
}

async function logitsOf(image) { // prepared bytes -> logits
  const [channels, height, width] = about.input_size, [input, output] = about.tensors
  let tensor
  if (about.input === "uint8 NHWC") tensor = new ort.Tensor("uint8", image, [1, height, width, channels])
  else {
    const values = new Float32Array(image.length), area = height * width
    for (let c = 0; c < channels; c++)
      for (let i = 0; i < area; i++)
        values[c * area + i] = (Math.fround(image[i * channels + c] / 255) - about.mean[c]) / about.std[c]
    tensor = new ort.Tensor("float32", values, [1, channels, height, width])
  }
  return (await session.run({ [input]: tensor }, [output]))[output].data
}

async function predict(picture) {
  const logits = Array.from(await logitsOf(await prepare(picture)), logit => logit / (about.temperature ?? 1))
  if (!logits.every(Number.isFinite)) throw new Error("The model's logits are not finite.")
  const most = logits.reduce((a, b) => Math.max(a, b))
  const powers = logits.map(logit => Math.exp(logit - most)), sum = powers.reduce((a, b) => a + b)
  const predictions = powers
    .map((power, index) => ({ label: about.label_names[index], probability: power / sum, index }))
    .sort((a, b) => b.probability - a.probability || a.index - b.index).slice(0, 5)
  return { predictions, none_of_these: predictions[0].probability < (about.threshold ?? 0) }
}

// ---- from a file to the prepared bytes ----

const starts = (bytes, text, at = 0) => [...text].every((letter, i) => bytes[at + i] === letter.charCodeAt(0))
const uint32 = (bytes, at) => new DataView(bytes.buffer, bytes.byteOffset).getUint32(at)

// Return the position of a picture's EXIF data, or -1. Throw an Error for a picture that browsers and
// deploy/preprocess.py would read differently.
function examine(bytes) {
  const cut = new Error("The picture is cut off: its file is not complete.")
  if (!bytes.length) throw new Error("The file is empty.")
  if (starts(bytes, "\xff\xd8\xff")) return examineJpeg(bytes, cut)
  if (starts(bytes, "\x89PNG")) return examinePng(bytes, cut)
  if (starts(bytes, "RIFF") && starts(bytes, "WEBP", 8)) return examineWebp(bytes, cut)
  if (starts(bytes, "ftyphe", 4) || starts(bytes, "ftypmi", 4))
    throw new Error("This is HEIC, as iPhones make it: set the camera to Most Compatible, or convert it to JPEG.")
  if (!starts(bytes, "GIF8")) throw new Error(`This is not a picture of a known format: ${READS}.`)
  return -1
}

function examineJpeg(bytes, cut) {
  let exif = -1
  for (let at = 2; ;) { // from segment to segment, up to the first scan
    while (bytes[at] === 0xff && bytes[at + 1] === 0xff) at++
    if (at + 4 > bytes.length) throw cut
    if (bytes[at] !== 0xff) throw new Error("This JPEG is damaged.")
    const kind = bytes[at + 1]
    if (kind >= 0xc0 && kind <= 0xcf && ![0xc4, 0xc8, 0xcc].includes(kind) && bytes[at + 9] === 4)
      throw new Error("This JPEG has CMYK colours, for printing: save it with RGB colours.")
    if (kind === 0xe1 && starts(bytes, "Exif\0\0", at + 4) && exif < 0) exif = at + 10
    at += 2 + bytes[at + 2] * 256 + bytes[at + 3]
    if (kind === 0xda) {
      for (; at < bytes.length - 1; at++) if (bytes[at] === 0xff && bytes[at + 1] === 0xd9) return exif
      throw cut
    }
  }
}

function examinePng(bytes, cut) {
  let exif = -1
  if (bytes.length < 33) throw cut
  if (bytes[24] === 16) throw new Error("This PNG has 16 bits a channel: save it with 8.")
  for (let at = 8; at + 12 <= bytes.length; at += 12 + uint32(bytes, at)) {
    const end = at + 8 + uint32(bytes, at)
    if (end + 4 > bytes.length) throw cut
    if (uint32(bytes, end) !== crc32(bytes.subarray(at + 4, end))) throw new Error("This PNG is damaged.")
    if (starts(bytes, "eXIf", at + 4)) exif = at + 8
    if (starts(bytes, "IEND", at + 4)) return exif
  }
  throw cut
}

function examineWebp(bytes, cut) {
  const view = new DataView(bytes.buffer), end = view.getUint32(4, true) + 8
  let exif = -1
  if (end > bytes.length) throw cut
  for (let at = 12, size; at + 8 <= end; at += 8 + size + (size & 1)) {
    size = view.getUint32(at + 4, true)
    if (at + 8 + size > end) throw cut
    if (starts(bytes, "EXIF", at)) exif = at + (starts(bytes, "Exif\0\0", at + 8) ? 14 : 8)
  }
  return exif
}

// Return the orientation of a picture, 1 to 8, and set it to 1 in the bytes, because browsers apply it for some formats only
function takeOrientation(bytes, exif) {
  const view = new DataView(bytes.buffer), little = exif >= 0 && starts(bytes, "II", exif)
  try {
    if (exif >= 0) {
      const list = exif + view.getUint32(exif + 4, little)
      for (let at = list + 2, left = view.getUint16(list, little); left > 0; at += 12, left--) {
        if (view.getUint16(at, little) !== 0x0112 || view.getUint16(at + 2, little) !== 3) continue
        const value = view.getUint16(at + 8, little)
        view.setUint16(at + 8, 1, little)
        if (starts(bytes, "\x89PNG")) { // the chunk ends with its checksum
          const end = exif + view.getUint32(exif - 8)
          view.setUint32(end, crc32(bytes.subarray(exif - 4, end)))
        }
        return value >= 1 && value <= 8 ? value : 1
      }
    }
  } catch (reason) { // damaged EXIF data of a good picture: RangeError
    if (!(reason instanceof RangeError)) throw reason
  }
  const text = new TextDecoder("latin1").decode(bytes.subarray(0, 1 << 20))
  return Number(text.match(/tiff:Orientation(?:="|>)([1-8])/)?.[1] ?? 1) // else the orientation in XMP data
}

const CRC = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let bit = 0; bit < 8; bit++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1
  return n
})

function crc32(bytes) {
  let crc = -1
  for (let i = 0; i < bytes.length; i++) crc = CRC[(crc ^ bytes[i]) & 255] ^ (crc >>> 8)
  return ~crc >>> 0
}

const KERNELS = { // reach in pixels, and the weight at a distance
  bilinear: [1, x => Math.max(0, 1 - x)],
  bicubic: [2, x => (x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0)],
}

function weights(from, to, first, count) { // the input pixels of `count` output pixels, from the output pixel `first` on
  const [reach, kernel] = KERNELS[about.interpolation]
  const scale = from / to, stretch = Math.max(scale, 1), support = reach * stretch
  return Array.from({ length: count }, (_, i) => {
    const centre = (first + i + 0.5) * scale
    const low = Math.max(0, Math.trunc(centre - support + 0.5)), high = Math.min(from, Math.trunc(centre + support + 0.5))
    const shares = Array.from({ length: high - low }, (_, x) => kernel(Math.abs((x + low - centre + 0.5) * (1 / stretch))))
    const sum = shares.reduce((a, b) => a + b, 0)
    const fixed = share => Math.trunc((share / sum) * 2 ** 22 + (share < 0 ? -0.5 : 0.5))
    return { low, shares: Int32Array.from(shares, fixed) }
  })
}

// Resize one axis: `step` and `line` are the distances, in bytes, to the next pixel of the axis and to the next line
function resize(source, step, line, lines, table, target, targetStep, targetLine, targetStart = 0) {
  for (let n = 0; n < lines; n++)
    for (let i = 0; i < table.length; i++) {
      const { low, shares } = table[i]
      let r = 1 << 21, g = r, b = r
      for (let k = 0, p = n * line + low * step; k < shares.length; k++, p += step) {
        const share = shares[k]
        r = (r + source[p] * share) | 0
        g = (g + source[p + 1] * share) | 0
        b = (b + source[p + 2] * share) | 0
      }
      const q = targetStart + n * targetLine + i * targetStep
      target[q] = r >> 22 // the array clips to 0 and 255
      target[q + 1] = g >> 22
      target[q + 2] = b >> 22
    }
}

function whiten(pixels) { // lay transparent RGBA on white
  for (let p = 3; p < pixels.length; p += 4)
    if (pixels[p] < 255)
      for (let q = p - 3; q < p; q++) pixels[q] = Math.round((pixels[q] * pixels[p]) / 255) + 255 - pixels[p]
}

const roundHalfToEven = x => (x % 1 === 0.5 ? 2 * Math.round(x / 2) : Math.round(x))

function resizedSize(width, height) { // before the crop
  const [, H, W] = about.input_size, short = Math.floor(H / about.crop)
  if (H !== W) return [Math.floor(W / about.crop), short]
  return width <= height ? [short, Math.trunc((short * height) / width)] : [Math.trunc((short * width) / height), short]
}

const TURNS = { // orientation -> the canvas transform that undoes it, for a stored picture of w x h pixels
  1: () => [1, 0, 0, 1, 0, 0],
  2: w => [-1, 0, 0, 1, w, 0],
  3: (w, h) => [-1, 0, 0, -1, w, h],
  4: (w, h) => [1, 0, 0, -1, 0, h],
  5: () => [0, 1, 1, 0, 0, 0],
  6: (w, h) => [0, 1, -1, 0, h, 0],
  7: (w, h) => [0, -1, -1, 0, h, w],
  8: w => [0, -1, 1, 0, 0, w],
}

async function prepare(picture) { // a Blob -> the bytes that deploy.preprocess.prepare makes of it
  const bytes = new Uint8Array(await picture.arrayBuffer()), turn = takeOrientation(bytes, examine(bytes))
  const bitmap = await createImageBitmap(new Blob([bytes]), { colorSpaceConversion: "none", premultiplyAlpha: "none" }).catch(() => {
    throw new Error("The picture is damaged, too large, or not of a kind that this browser reads.")
  })
  const upright = turn < 5 ? [bitmap.width, bitmap.height] : [bitmap.height, bitmap.width]
  const [width, height] = upright, [channels, H, W] = about.input_size, [w, h] = resizedSize(width, height)
  if (width * height > MOST_PIXELS || w * h > Math.max(MOST_PIXELS, 4 * H * W))
    throw new Error(`The picture is too large: ${width} x ${height} pixels, or too narrow a strip.`)
  const columns = weights(width, w, roundHalfToEven((w - W) / 2), W)
  const rows = weights(height, h, roundHalfToEven((h - H) / 2), H)
  const first = rows[0].low, last = rows[H - 1].low + rows[H - 1].shares.length
  const narrow = new Uint8ClampedArray((last - first) * W * 3), most = Math.max(1, Math.floor(STRIP / width))
  const canvas = new OffscreenCanvas(width, Math.min(most, last - first))
  const context = canvas.getContext("2d", { willReadFrequently: true })
  const transform = TURNS[turn](bitmap.width, bitmap.height)
  context.imageSmoothingEnabled = false
  for (let top = first; top < last; top += most) { // the width first, strip by strip
    const count = Math.min(most, last - top)
    context.resetTransform()
    context.clearRect(0, 0, width, count)
    context.setTransform(...transform.slice(0, 5), transform[5] - top)
    context.drawImage(bitmap, 0, 0)
    const pixels = context.getImageData(0, 0, width, count).data
    whiten(pixels)
    resize(pixels, 4, 4 * width, count, columns, narrow, 3, 3 * W, (top - first) * 3 * W)
  }
  bitmap.close()
  const image = new Uint8ClampedArray(H * W * 3)
  for (const row of rows) row.low -= first
  resize(narrow, 3 * W, 3, W, rows, image, 3 * W, 3)
  if (channels === 3) return new Uint8Array(image.buffer)
  const grey = i => (image[3 * i] * 19595 + image[3 * i + 1] * 38470 + image[3 * i + 2] * 7471 + 0x8000) >> 16
  return Uint8Array.from({ length: H * W }, (_, i) => grey(i))
}

// ---- the self-test ----

async function selfTest(text) { // packed vectors of deploy.selftest -> the differences
  const { pictures, tolerance, logits } = JSON.parse(new TextDecoder().decode(await unpack(text, () => {})))
  const largest = logits.flat().reduce((most, x) => Math.max(most, Math.abs(x)), 0), different = []
  let error = 0
  for (const [i, picture] of pictures.entries()) {
    const image = await prepare(new Blob([Uint8Array.from(atob(picture.content), letter => letter.charCodeAt(0))]))
    if (crc32(image) !== picture.crc32) different.push(picture.file)
    const found = await logitsOf(image)
    for (const [j, x] of logits[i].entries()) error = Math.max(error, Math.abs(found[j] - x) / largest || Infinity * (found[j] !== x))
  }
  return { count: pictures.length, different, error, tolerance, passed: !different.length && error <= tolerance }
}

const TASKS = { load, predict, selfTest, prepare, logitsOf }
let queue = Promise.resolve() // one task at a time, because a session runs one picture at a time

async function answer({ id, task, given }) {
  try {
    postMessage({ id, result: await TASKS[task](given) })
  } catch (reason) {
    postMessage({ id, error: reason?.message || String(reason) })
  }
}

self.onmessage = ({ data }) => { queue = queue.then(() => answer(data)) }
