// A heat map: similarities as colours whose lightness rises evenly from dark violet over red to pale yellow.

const STEPS = 256;

/** OKLCH (lightness 0 to 1, chroma, hue in degrees) as linear-light sRGB, which may lie outside 0 to 1. */
function linear(lightness, chroma, hue) {
  const angle = (hue * Math.PI) / 180;
  const [a, b] = [chroma * Math.cos(angle), chroma * Math.sin(angle)];
  const l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3;
  return [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ];
}

const gamma = (value) => (value <= 0.0031308 ? 12.92 * value : 1.055 * value ** (1 / 2.4) - 0.055);

/** One colour, with as much chroma as a screen can show at that lightness. */
function colour(share) {
  const [lightness, hue] = [0.16 + 0.8 * share, 285 + 170 * share];
  let chroma = 0.04 + 0.16 * Math.sin(Math.PI * Math.min(1, 0.12 + 0.88 * share));
  let found = linear(lightness, chroma, hue);
  while (chroma > 0 && found.some((part) => part < 0 || part > 1)) found = linear(lightness, (chroma -= 0.002), hue);
  return found.map((part) => Math.round(255 * gamma(Math.min(Math.max(part, 0), 1))));
}

/** The table: 256 colours [r, g, b], the least first. */
export const COLOURS = Array.from({ length: STEPS }, (_, step) => colour(step / (STEPS - 1)));

/** Draw a grid [h][w] of similarities, a cell a pixel of the canvas; null is left clear. Returns the extreme values. */
export function drawHeat(canvas, grid) {
  const values = grid.flat().filter(Number.isFinite);
  const low = values.reduce((a, b) => Math.min(a, b), Infinity);
  const high = values.reduce((a, b) => Math.max(a, b), -Infinity);
  [canvas.width, canvas.height] = [grid[0].length, grid.length];
  const picture = new ImageData(canvas.width, canvas.height);
  grid.flat().forEach((value, at) => {
    if (!Number.isFinite(value)) return;
    const step = high > low ? Math.round(((value - low) / (high - low)) * (STEPS - 1)) : STEPS - 1;
    picture.data.set([...COLOURS[step], 255], 4 * at);
  });
  canvas.getContext("2d").putImageData(picture, 0, 0);
  return { low, high };
}

/** The legend: the whole table as one row. */
export function drawScale(canvas) {
  drawHeat(canvas, [Array.from({ length: canvas.width }, (_, step) => step)]);
}
