;;; infilld in Emacs with lsp-mode 9.0.1 or newer -*- lexical-binding: t -*-
;; Put this into your init file, after lsp-mode. `infilld-lsp' must be on PATH.
;; C-<return> inserts the suggestion, C-n and C-p choose another, any other key hides it.

(with-eval-after-load 'lsp-mode
  (lsp-register-client
   (make-lsp-client
    :new-connection (lsp-stdio-connection '("infilld-lsp"))
    :activation-fn (lambda (&rest _) t)
    :add-on? t                          ; runs beside the language's own server
    :server-id 'infilld))
  (setq lsp-inline-completion-enable t
        lsp-inline-completion-idle-delay 0.3))
