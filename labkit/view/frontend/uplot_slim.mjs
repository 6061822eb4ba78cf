// uPlot without what our charts do not use (calendars, its own legend, other scales, bars, splines, joins), so that
// the bundle stays small. Each cut must find its words: with another version of uPlot the build fails rather than guess.
import { readFile } from "node:fs/promises";

const CUTS = [
  // what only its users would call
  [/uPlot\.assign = assign;[\s\S]*?(?=export \{ uPlot as default \})/, "", 1],
  // times of day: our time runs in seconds since the start
  [/const \[ timeIncrs(Ms|S), .* \] = genTimeStuffs\(.*\);/g, "", 2],
  [/const _tzDate  = [\s\S]*?const _timeSeriesVal  = .*;/, "", 1],
  [/let isTime = .*;/g, "", 3],
  [/\bisTime\b/g, "false", 7],
  // its legend
  [/const showLegend = legend\.show;/, "", 1],
  [/\bshowLegend\b/g, "false", 9],
  // logarithmic scales
  [/\b(\w+\.)?distr == [34]\b/g, "false", 18],
  [/\b(\w+\.)?distr >= 3\b/g, "false", 1],
  // custom and ordinal scales, scatter plots, the series nearest to the pointer, zoom by dragging, points along lines
  [/\b(\w+\.)?distr == (2|100)\b/g, "false", 11],
  [/\bxScaleDistr == [234]\b/g, "false", 6],
  [/\bmode == 2\b/g, "false", 16],
  [/\bmode == 1\b/g, "true", 15],
  [/const cursorFocus = .*;/, "", 1],
  [/\bcursorFocus\b/g, "false", 6],
  [/select\.show && dragging/, "false", 1],
  [/onMouse\((mousedown|dblclick),  ?over, .*\);|events\.(mousedown|mouseup|dblclick) = .*;/g, "", 5],
  [/^\tfunction (initLegendRow|mouseDown|mouseUp|dblClick|addSeries|delSeries|addBand|setBand|delBand)\([\s\S]*?^\t\}$/gm, "", 9],
  [/= points\(\) ;/, "= () => null;", 1],
  // fills between series, and series that come and go
  [/self\.(addSeries|delSeries|addBand|setBand|delBand) = .*;/g, "", 5],
  [/let \[ bandFillDir, bandClipDir \] = .*;/g, "", 3],
  [/\bbandFillDir != 0|\bbandClipDir != 0/g, "false", 6],
  [/fillTo\(u, seriesIdx, series\.min, series\.max, bandFillDir\)/g, "fillTo(u, seriesIdx, series.min, series.max, 0)", 3],
  [/flags != 0 && bands\.forEach/, "false && bands.forEach", 1],
];

export const uplotSlim = {
  name: "uplot-slim",
  setup(build) {
    build.onLoad({ filter: /uPlot\.esm\.js$/ }, async ({ path }) => {
      let contents = await readFile(path, "utf8");
      for (const [pattern, replacement, times] of CUTS) {
        let found = 0;
        contents = contents.replace(pattern, () => (found++, replacement));
        if (found !== times) return { errors: [{ text: `uplot_slim.mjs: ${pattern} was found ${found} times, not ${times}` }] };
      }
      return { contents, loader: "js" };
    });
  },
};
