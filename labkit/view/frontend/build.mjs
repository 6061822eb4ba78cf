// Bundles src/ into ../static, which is committed and shipped with the package. The same sources give the same bytes.
import { readFileSync, statSync, writeFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";
import { uplotSlim } from "./uplot_slim.mjs";

const LIMIT = 100_000; // bytes of dashboard.js: it travels with every widget
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

const bundle = (entryPoints, banner) => build({ ...common, entryPoints, banner });
await bundle({ dashboard: "src/index.ts" }, { js: `/* ${made} It has parts of uPlot, whose license is in uplot.LICENSE. */` });
await bundle({ replay: "src/replay_page.ts" }, { js: `/* ${made} It has parts of uPlot:\n${license}\n*/` }); // travels alone
await bundle({ dashboard: "src/dashboard.css" }, { css: `/* ${made} */` });
writeFileSync(here("../static/uplot.LICENSE"), `${license}\n`);

const size = statSync(here("../static/dashboard.js")).size;
console.log(`dashboard.js: ${size.toLocaleString("en")} bytes`);
if (size > LIMIT) {
  console.error(`That is over the limit of ${LIMIT.toLocaleString("en")} bytes.`);
  process.exit(1);
}
