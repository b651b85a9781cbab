// A port of everything before the logits to another language, here Node, held against the conformance vectors:
//
//     npm install --ignore-scripts
//     node classify.mjs ../../runs/001-mobilenet_v2-uskd/student            # status 1 if a picture differs
//     node classify.mjs ../../runs/001-mobilenet_v2-uskd/student photo.jpg
//
// deploy/porting.md states the steps in words. A JPEG is always decoded whole. Only student.onnx is run.
import { readFileSync } from "node:fs"
import * as ort from "onnxruntime-web"
import sharp from "sharp"

const KERNELS = { // reach, and the weight at a distance
  bilinear: [1, d => Math.max(0, 1 - d)],
  bicubic: [2, d => (d < 1 ? (1.5 * d - 2.5) * d * d + 1 : d < 2 ? ((-0.5 * d + 2.5) * d - 4) * d + 2 : 0)],
}

async function decode(file) { // -> upright RGB, transparent pixels on white
  const { data, info } = await sharp(file).autoOrient().raw().toBuffer({ resolveWithObject: true })
  const { width, height, channels } = info, colours = channels > 2 ? 3 : 1, pixels = new Uint8Array(width * height * 3)
  for (let i = 0; i < width * height; i++) {
    const alpha = channels % 2 ? 255 : data[i * channels + colours]
    for (let c = 0; c < 3; c++) {
      const value = data[i * channels + (colours === 3 ? c : 0)]
      pixels[3 * i + c] = Math.round((value * alpha) / 255) + 255 - alpha
    }
  }
  return { pixels, width, height }
}

function resizeAxis(from, to, kind) { // -> for each output pixel: the first input pixel, and 22-bit weights
  const [reach, weight] = KERNELS[kind], scale = from / to, stretch = Math.max(scale, 1)
  return Array.from({ length: to }, (_, i) => {
    const centre = (i + 0.5) * scale
    const low = Math.max(0, Math.trunc(centre - reach * stretch + 0.5))
    const high = Math.min(from, Math.trunc(centre + reach * stretch + 0.5))
    const w = Array.from({ length: high - low }, (_, k) => weight(Math.abs((low + k - centre + 0.5) / stretch)))
    const sum = w.reduce((a, b) => a + b, 0)
    return [low, w.map(x => Math.trunc((x / sum) * 2 ** 22 + (x < 0 ? -0.5 : 0.5)))]
  })
}

const to8bits = sum => Math.min(255, Math.max(0, (sum + 2 ** 21) >> 22))

function resize({ pixels, width, height }, [w, h], kind) { // the width first, then the height
  const narrow = new Uint8Array(w * height * 3), out = new Uint8Array(w * h * 3)
  resizeAxis(width, w, kind).forEach(([low, weights], x) => {
    for (let y = 0; y < height; y++)
      for (let c = 0; c < 3; c++) {
        const sum = weights.reduce((s, k, i) => s + k * pixels[(y * width + low + i) * 3 + c], 0)
        narrow[(y * w + x) * 3 + c] = to8bits(sum)
      }
  })
  resizeAxis(height, h, kind).forEach(([low, weights], y) => {
    for (let i = 0; i < w * 3; i++) {
      const sum = weights.reduce((s, k, row) => s + k * narrow[(low + row) * w * 3 + i], 0)
      out[y * w * 3 + i] = to8bits(sum)
    }
  })
  return out
}

const halfToEven = x => (x % 1 === 0.5 ? 2 * Math.round(x / 2) : Math.round(x))

export async function prepare(file, about) {
  const [channels, H, W] = about.input_size, image = await decode(file), { width, height } = image
  const short = Math.floor(H / about.crop)
  let size = [Math.floor(W / about.crop), short]
  if (H === W)
    size = width <= height ? [short, Math.trunc((short * height) / width)] : [Math.trunc((short * width) / height), short]
  const resized = resize(image, size, about.interpolation)
  const left = halfToEven((size[0] - W) / 2), top = halfToEven((size[1] - H) / 2)
  const out = new Uint8Array(H * W * channels)
  for (let y = 0; y < H; y++)
    for (let x = 0; x < W; x++) {
      const [r, g, b] = resized.subarray(((top + y) * size[0] + left + x) * 3)
      if (channels === 3) out.set([r, g, b], (y * W + x) * 3)
      else out[y * W + x] = (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16
    }
  return out
}

const [student, ...photos] = process.argv.slice(2)
const about = JSON.parse(readFileSync(`${student}/vectors/index.json`)), [channels, H, W] = about.input_size
const session = await ort.InferenceSession.create(readFileSync(`${student}/student.onnx`))

async function logitsOf(image) {
  const tensor = new ort.Tensor("uint8", image, [1, H, W, channels])
  return (await session.run({ images: tensor })).logits.data
}

for (const photo of photos) {
  const logits = await logitsOf(await prepare(photo, about))
  console.log(`${photo}: class ${logits.indexOf(Math.max(...logits))}`)
}
if (!photos.length) {
  const { tolerance, values } = about.logits["student.onnx"], largest = Math.max(...values.flat().map(Math.abs))
  for (const [i, picture] of about.pictures.entries()) {
    const expected = readFileSync(`${student}/vectors/${picture.prepared}`)
    const image = await prepare(`${student}/vectors/${picture.file}`, about)
    const different = image.filter((value, at) => value !== expected[at]).length
    const logits = await logitsOf(new Uint8Array(expected))
    const error = Math.max(...values[i].map((x, at) => Math.abs(x - logits[at]))) / largest
    const passed = !different && error <= tolerance
    if (!passed) process.exitCode = 1
    console.log(`${passed ? "ok  " : "FAIL"} ${picture.file}: ${different} bytes differ; logits by ${error.toExponential(1)}`)
  }
}
