export default { test: { testTimeout: 60_000 } }; // a busy machine is not a failure
