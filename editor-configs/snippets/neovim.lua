-- infilld in Neovim: suggestions as ghost text while you type.
-- Copy to ~/.config/nvim/plugin/infilld.lua. `infilld-lsp` must be on PATH.
--   <Tab>    inserts the suggestion that is shown; without one it is the usual Tab
--   <C-]>    hides it
--   :InfilldRewrite what to do   writes the selected lines anew (:'<,'>InfilldRewrite …)
--   :InfilldRepair               repairs the selected lines, where diagnostics are if there are some
--   :InfilldFillGaps             fills every <|gap|> of the document
-- Neovim 0.12 has its own inline completion, which is used there; 0.11 uses what is below.

vim.lsp.config("infilld", {
  cmd = { "infilld-lsp" },
  root_markers = { ".git" },
  capabilities = { textDocument = { inlineCompletion = { dynamicRegistration = false } } },
  -- init_options = { alternatives = 3, automaticDeadlineMs = 1000 },
})
vim.lsp.enable("infilld")

-- Sends a command of the bridge, which changes the document in one undo step or says why not.
local function run(name, params)
  local buf = vim.api.nvim_get_current_buf()
  local client = vim.lsp.get_clients({ name = "infilld", bufnr = buf })[1]
  if not client then
    return vim.notify("infilld does not run for this document", vim.log.levels.WARN)
  end
  params.textDocument = vim.lsp.util.make_text_document_params(buf)
  local command = { command = "infilld." .. name, arguments = { params } }
  client:request("workspace/executeCommand", command, function(problem)
    if problem then
      vim.notify("infilld: " .. problem.message, vim.log.levels.WARN)
    end
  end, buf)
end

local function lines(first, last)
  -- A character past the end of a line means its end.
  return {
    start = { line = first - 1, character = 0 },
    ["end"] = { line = last - 1, character = 2 ^ 31 - 1 },
  }
end

vim.api.nvim_create_user_command("InfilldRewrite", function(got)
  run("rewrite", { range = lines(got.line1, got.line2), instruction = got.args })
end, { range = true, nargs = "+", desc = "infilld: rewrite the selected lines" })

vim.api.nvim_create_user_command("InfilldRepair", function(got)
  local marked = {}
  for _, found in ipairs(vim.diagnostic.get(0)) do
    if found.lnum >= got.line1 - 1 and found.lnum < got.line2 then
      -- Whole lines: what is wrong is seldom just where it was noticed.
      marked[#marked + 1] = lines(found.lnum + 1, (found.end_lnum or found.lnum) + 1)
    end
  end
  run("repair", { range = lines(got.line1, got.line2), diagnostics = marked })
end, { range = true, desc = "infilld: repair the selected lines" })

vim.api.nvim_create_user_command("InfilldFillGaps", function()
  run("fillGaps", vim.empty_dict())
end, { desc = "infilld: fill every <|gap|>" })

if vim.lsp.inline_completion then
  vim.lsp.inline_completion.enable()
  vim.keymap.set("i", "<Tab>", function()
    if not vim.lsp.inline_completion.get() then
      return "<Tab>"
    end
  end, { expr = true, desc = "infilld: insert the suggestion" })
  return
end

local DEBOUNCE_MS = 150
local METHOD = "textDocument/inlineCompletion"
local namespace = vim.api.nvim_create_namespace("infilld")
local timer = assert(vim.uv.new_timer())
local shown -- { buf, row, col, text }: where the suggestion starts, and all of it
local cancel = function() end

local function hide()
  if shown and vim.api.nvim_buf_is_valid(shown.buf) then
    vim.api.nvim_buf_clear_namespace(shown.buf, namespace, 0, -1)
  end
  shown = nil
end

-- What of the suggestion is not typed yet; nil when the text or the cursor has left it.
local function rest()
  if not shown or shown.buf ~= vim.api.nvim_get_current_buf() then
    return nil
  end
  local row, col = unpack(vim.api.nvim_win_get_cursor(0))
  if row - 1 ~= shown.row or col < shown.col then
    return nil
  end
  local typed = vim.api.nvim_get_current_line():sub(shown.col + 1, col)
  return vim.startswith(shown.text, typed) and shown.text:sub(#typed + 1) or nil
end

local function show()
  local text = rest()
  if not text or text == "" then
    return hide()
  end
  local lines = vim.split(text, "\n", { plain = true })
  local below = {}
  for i = 2, #lines do
    below[#below + 1] = { { lines[i] == "" and " " or lines[i], "Comment" } }
  end
  local row, col = unpack(vim.api.nvim_win_get_cursor(0))
  vim.api.nvim_buf_set_extmark(shown.buf, namespace, row - 1, col, {
    id = 1,
    virt_text = { { lines[1], "Comment" } },
    virt_text_pos = "inline",
    virt_lines = below,
  })
end

local function request()
  local buf = vim.api.nvim_get_current_buf()
  local client = vim.lsp.get_clients({ bufnr = buf, name = "infilld" })[1]
  if not client or vim.fn.mode() ~= "i" then
    return
  end
  cancel()
  local params = vim.lsp.util.make_position_params(0, client.offset_encoding)
  params.context = { triggerKind = 2 }
  local ok, id = client:request(METHOD, params, function(err, result)
    if err or not result or vim.fn.mode() ~= "i" then
      return -- null: a newer request is under way
    end
    hide()
    local item = result.items[1]
    if not item or vim.api.nvim_get_current_buf() ~= buf then
      return
    end
    local start = item.range.start
    local line = vim.api.nvim_buf_get_lines(buf, start.line, start.line + 1, false)[1] or ""
    local col = vim.str_byteindex(line, client.offset_encoding, start.character, false)
    shown = { buf = buf, row = start.line, col = col, text = item.insertText }
    show()
  end, buf)
  cancel = function()
    if ok and id then
      client:cancel_request(id)
    end
    cancel = function() end
  end
end

local function insert()
  local text = rest()
  if not text or text == "" then
    return false
  end
  -- Not at once: an expression mapping must not change the text.
  vim.schedule(function()
    local row, col = unpack(vim.api.nvim_win_get_cursor(0))
    local lines = vim.split(text, "\n", { plain = true })
    hide()
    vim.api.nvim_buf_set_text(0, row - 1, col, row - 1, col, lines)
    local last = #lines[#lines]
    vim.api.nvim_win_set_cursor(0, { row + #lines - 1, #lines == 1 and col + last or last })
  end)
  return true
end

local group = vim.api.nvim_create_augroup("infilld", {})
vim.api.nvim_create_autocmd({ "InsertEnter", "TextChangedI", "CursorMovedI" }, {
  group = group,
  callback = function()
    show()
    timer:start(DEBOUNCE_MS, 0, vim.schedule_wrap(request))
  end,
})
vim.api.nvim_create_autocmd("InsertLeave", {
  group = group,
  callback = function()
    timer:stop()
    cancel()
    hide()
  end,
})
vim.keymap.set("i", "<Tab>", function()
  return insert() and "" or "<Tab>"
end, { expr = true, desc = "infilld: insert the suggestion" })
vim.keymap.set("i", "<C-]>", hide, { desc = "infilld: hide the suggestion" })
