// Bundles src/ into ../static, which is committed and shipped with the package. The same sources give the same bytes.
import { readFileSync, statSync, writeFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";
import { minify } from "terser";
import { uplotSlim } from "./uplot_slim.mjs";

const LIMIT = 100_000; // bytes of dashboard.js: it travels with every widget
// Neither our code nor uPlot's asks a function for its `length`, or makes objects of an anonymous one with `new`.
const COMPRESS = { passes: 3, keep_fargs: false, unsafe_arrows: true, unsafe_methods: true };
const here = (path) => fileURLToPath(new URL(path, import.meta.url));
const license = readFileSync(here("node_modules/uplot/LICENSE"), "utf8").trim();
const made = "Made by `npm run build` from labkit/view/frontend.";

const common = {
  absWorkingDir: here("."),
  bundle: true,
  minify: true,
  format: "esm",
  target: "es2022",
  charset: "utf8",
  legalComments: "none",
  logLevel: "warning",
  outdir: "../static",
  plugins: [uplotSlim],
};

// esbuild makes one file of many, and terser, which looks further, makes that smaller.
async function script(name, source, banner) {
  const { outputFiles } = await build({ ...common, entryPoints: { [name]: source }, write: false });
  const { code } = await minify(outputFiles[0].text, { module: true, ecma: 2022, compress: COMPRESS, format: { comments: false } });
  writeFileSync(here(`../static/${name}.js`), `${banner}\n${code}\n`);
}
await script("dashboard", "src/index.ts", `/* ${made} It has parts of uPlot, whose license is in uplot.LICENSE. */`);
await script("replay", "src/replay_page.ts", `/* ${made} It has parts of uPlot:\n${license}\n*/`); // travels alone
await build({ ...common, entryPoints: { dashboard: "src/dashboard.css" }, banner: { css: `/* ${made} */` } });
writeFileSync(here("../static/uplot.LICENSE"), `${license}\n`);

const size = statSync(here("../static/dashboard.js")).size;
console.log(`dashboard.js: ${size.toLocaleString("en")} bytes`);
if (size > LIMIT) {
  console.error(`That is over the limit of ${LIMIT.toLocaleString("en")} bytes.`);
  process.exit(1);
}
